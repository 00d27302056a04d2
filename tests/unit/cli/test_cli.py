"""The command line as a user calls it: exit codes, streams, no traceback, no wait for what a verb does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def testbed(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one verb in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "testbed", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


testbed.__test__ = False  # type: ignore[attr-defined]


def test_validate_says_fine() -> None:
    result = testbed("validate", "topologies/pair.yaml", "topologies/fabric.yaml")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1] == (
        "topologies/fabric.yaml: fine (6 hosts, 4 switches, 11 links, 4 apps, 2 migrations)"
    )


def test_validate_works_from_any_folder(tmp_path: Path) -> None:
    assert testbed("validate", "topologies/migrate_pair.yaml", "pair", cwd=tmp_path).returncode == 0


def test_validate_says_all_that_is_wrong_in_all_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nhosts: {h1: {}}\nswitches: [s1]\nlinks: [[h1, s9]]\ncolour: red\n")
    result = testbed("validate", str(bad), "topologies/pair.yaml", "nothing.yaml")
    assert result.returncode == 2
    assert f"{bad}:4: links[0].ends[1]: no such host or switch (got s9)" in result.stderr
    assert f"{bad}:5: colour: unknown key" in result.stderr
    assert "nothing.yaml: no such file" in result.stderr
    assert "topologies/pair.yaml: fine" in result.stdout
    problems = json.loads(testbed("validate", "--json", str(bad)).stdout)
    assert [(problem["path"], problem["line"]) for problem in problems] == [("links[0].ends[1]", 4), ("colour", 5)]


def test_validate_loads_nothing_heavy() -> None:
    """Invariant: what only a run needs is not imported by verbs that start nothing."""
    code = (
        "import sys; sys.argv = ['testbed', 'validate', 'topologies/pair.yaml']\n"
        "from testbed.cli.main import app; app()\n"
        "heavy = {'paramiko', 'mininet', 'matplotlib', 'numpy', 'scipy', 'rich', 'testbed.network'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("run",), "Missing argument"),
        (("run", "pair", "--fast"), "No such option: --fast"),
        (("run", "pair", "--repeat", "0"), "--repeat"),
        (("run", "pear"), "did you mean pair?"),
        (("clean", "no-such-run"), "no such run"),
        ((), ""),
    ],
)
def test_wrong_calls(words: tuple[str, ...], message: str) -> None:
    result = testbed(*words)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not words or result.stdout == ""


def test_dry_run_resolves_and_starts_nothing(tmp_path: Path) -> None:
    result = testbed("run", "fabric", "--dry-run", "--json", cwd=tmp_path)
    resolved = json.loads(result.stdout)
    assert result.returncode == 0
    assert resolved["hosts"]["h5"]["node_ip"] == "100.64.0.5"
    assert list(tmp_path.iterdir()) == []


def test_schemas_are_json() -> None:
    for which in ("topology", "summary"):
        assert json.loads(testbed("schema", which).stdout)["$schema"].startswith("https://json-schema.org/")


def test_run_without_root_says_how(tmp_path: Path) -> None:
    code = "import os; os.geteuid = lambda: 1000\nfrom testbed.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "run", "pair"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3
    assert result.stderr.startswith("testbed: network namespaces need root\n  hint: sudo ")
