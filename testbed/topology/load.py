"""Reading a topology file: YAML with line numbers, then the models, then the checks; all errors come at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from testbed.base.errors import BadInput, Problem, TopologyError
from testbed.topology import checks
from testbed.topology.models import App, Host, Impair, Link, Migration, Nic, Report, Section, Topology
from testbed.topology.view import View

Lines = dict[str, int]
"""Path in the file (`apps.client.after`) → 1-based line."""


def find(name: str | Path) -> Path:
    """The file that `name` refers to: that path if it exists, else a topology that is shipped with the testbed.

    So `topologies/pair.yaml` and `pair` work from any folder. Raises BadInput if there is no such file.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = shipped_folder()
    if shipped is not None:
        for candidate in (shipped / given.name, shipped / f"{given.name}.yaml"):
            if candidate.is_file() and str(given.parent) in (".", "topologies"):
                return candidate
    known = sorted(path.stem for path in shipped.glob("*.yaml")) if shipped is not None else []
    near = difflib.get_close_matches(given.stem, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped topologies: {', '.join(known)}" if known else None
    raise BadInput("is a folder" if given.is_dir() else "no such file", where=str(given), hint=hint)


def shipped_folder() -> Path | None:
    """The folder `topologies/` of the checkout or of the installed distribution; None if neither exists.

    An installation puts data below the prefix whose `lib/python3.x/site-packages` has the package (`pip install`, also
    with `--user` or `--prefix`), or beside the package (`pip install --target`).
    """
    beside = Path(__file__).resolve().parents[2]
    installed = [root / "share/migros-testbed/topologies" for root in (beside, *beside.parents[2:3])]
    for folder in (beside / "topologies", *installed):
        if folder.is_dir():
            return folder
    return None


def load(name: str | Path) -> Topology:
    """Read and check one file. Raises BadInput if it cannot be read, TopologyError with all of its problems."""
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}", where=str(path)) from error
    return parse(text, str(name))


def parse(text: str, file: str = "<topology>") -> Topology:
    """Like `load`, but from a string; `file` is its name in error messages."""
    lines: Lines = {}
    problems: list[Problem] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _walk(node, "", lines, problems)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TopologyError(file, [_syntax(error)]) from error
    except RecursionError as error:
        raise TopologyError(file, [Problem("", "nested too deeply")]) from error
    if not isinstance(data, dict):
        raise TopologyError(
            file, [Problem("", "must be a mapping", hint="start with `name: …`, then add hosts, switches, links, apps")]
        )
    topology: Topology | None = None
    try:
        topology = Topology.model_validate(data)
    except ValidationError as error:
        problems += [_from_pydantic(detail) for detail in error.errors(include_url=False)]
    # The checks run on whatever could be read, so that a typo in one section does not hide mistakes in another.
    problems += checks.check(View.of(data))
    if problems:
        placed = [_with_line(problem, lines) for problem in problems]
        raise TopologyError(file, sorted(dict.fromkeys(placed), key=lambda problem: problem.line or 0))
    assert topology is not None
    return topology


def _walk(node: yaml.Node | None, path: str, lines: Lines, problems: list[Problem]) -> None:
    """Collect the line of every path, and report duplicate keys, which YAML readers drop silently."""
    if node is None:
        return
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            child = f"{path}.{key}" if path else key
            line = key_node.start_mark.line + 1
            if key in seen:
                problems.append(Problem(child, f"duplicate key (first on line {seen[key]})", line=line))
            seen[key] = line
            lines[child] = line
            _walk(value_node, child, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, f"{path}[{index}]", lines, problems)


def _syntax(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Problem("", f"invalid YAML: {what}", line=mark.line + 1 if mark is not None else None)


def _with_line(problem: Problem, lines: Lines) -> Problem:
    if problem.line is not None:
        return problem
    path = problem.path
    while path and path not in lines:
        cut = max(path.rfind("."), path.rfind("["))
        path = path[:cut] if cut > 0 else ""
    return Problem(problem.path, problem.message, problem.value, problem.hint, lines.get(path))


def show(value: Any) -> str:
    """A bad value as messages show it: on one line, at most 60 characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _from_pydantic(detail: ErrorDetails) -> Problem:
    """Translate one pydantic error: what is allowed, and a similar name for an unknown key or value."""
    kind, path, context = detail["type"], _path(detail["loc"]), detail.get("ctx", {})
    value = None if kind == "missing" else show(detail["input"])
    message, hint = detail["msg"], context.get("hint")
    if kind == "extra_forbidden":
        allowed = list(_section(detail["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(detail["loc"][-1]), allowed, 1)
        message, value = "unknown key; allowed: " + ", ".join(allowed), None
        hint = f"did you mean {near[0]}?" if near else None
    elif kind == "missing":
        message = "required key is missing"
    elif kind == "literal_error":
        values = [str(value) for value in _literals(_section(detail["loc"][:-1]).model_fields[str(detail["loc"][-1])])]
        near = difflib.get_close_matches(str(detail["input"]), values, 1)
        message, hint = f"invalid value; allowed: {', '.join(values)}", f"did you mean {near[0]}?" if near else None
    elif kind in _MESSAGES:
        message = _MESSAGES[kind].format(**context)
    return Problem(path, message, value, hint)


def _section(location: tuple[int | str, ...]) -> type[Section]:
    """The model of a location in the file, for example App for ("apps", "client")."""
    if not location:
        return Topology
    by_last: dict[int | str, type[Section]] = {"nic": Nic, "impair": Impair, "report": Report}
    by_first: dict[int | str, type[Section]] = {"hosts": Host, "links": Link, "apps": App, "migrations": Migration}
    return by_first[location[0]] if len(location) == 2 else by_last[location[-1]]


def _literals(field: FieldInfo) -> Iterator[Any]:
    """The values that a field allows: those of the Literal in its annotation."""
    open_annotations = [field.annotation]
    while open_annotations:
        annotation = open_annotations.pop()
        if get_origin(annotation) is Literal:
            yield from get_args(annotation)
        else:
            open_annotations += get_args(annotation)


_MESSAGES = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "list_type": "must be a list",
    "greater_than": "too small; allowed: more than {gt}",
    "greater_than_equal": "too small; allowed: {ge} or more",
    "less_than_equal": "too large; allowed: up to {le}",
    "less_than": "too large; allowed: below {lt}",
    "string_too_short": "must not be empty",
    "too_short": "too few; allowed: at least {min_length}",
    "too_long": "too many; allowed: at most {max_length}",
}
"""Messages for pydantic's error types."""
