"""Compile the C programs and libraries of this folder on demand, once per content.

`<name>.c` is one by itself; all `<name>/*.c` together are one. The output's folder is named after a hash of sources,
headers and the compiler's command line, so changed sources are compiled again, unchanged ones found in microseconds.
It is outside the source tree because a checkpointed program maps the library: the path must be the same at every
host and stay while the program lives.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
CACHE = Path("/var/lib/migros-testbed/native")

COMMON_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-D_GNU_SOURCE")
SHARED_FLAGS = ("-shared", "-fPIC", "-fvisibility=hidden")

# What a name becomes: a library to be loaded (LD_PRELOAD or CRIU's -L), or a program. A new library needs a line.
LIBRARIES = frozenset({"bridge", "criu_hook", "guard"})
LINK: dict[str, tuple[str, ...]] = {"bridge": ("-ldl", "-lpthread")}


class BuildError(Exception):
    """A C source could not be compiled; the text names the source, the command and what to install."""


def compiler() -> str:
    """Return the C compiler's path ($CC, cc, gcc or clang). Raises BuildError when there is none."""
    for candidate in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise BuildError("no C compiler found (tried $CC, cc, gcc, clang); install one: apt-get install gcc libc6-dev")


def names() -> list[str]:
    """Return everything that can be compiled."""
    return sorted({p.stem for p in SOURCES.glob("*.c")} | {p.parent.name for p in SOURCES.glob("*/*.c")})


def sources(name: str) -> list[Path]:
    """Return the C files that `name` is made of. Raises BuildError when there is no such name."""
    known = names()
    if name not in known:
        raise BuildError(f"no C source named {name!r}; there are: {', '.join(known)}")
    return sorted(SOURCES.joinpath(name).glob("*.c")) or [SOURCES / f"{name}.c"]


def command(name: str, output: Path) -> list[str]:
    """Return the compiler's command line for `name`, writing to `output`. Raises BuildError."""
    kind = SHARED_FLAGS if name in LIBRARIES else ()
    parts = map(str, sources(name))
    return [compiler(), *COMMON_FLAGS, *kind, "-o", str(output), *parts, *LINK.get(name, ())]


def path(name: str) -> Path:
    """Return the compiled `name`, compiling it when this content was never compiled. Raises BuildError."""
    parts = sources(name)
    digest = hashlib.sha256()
    for file in (*parts, *sorted(parts[0].parent.glob("*.h"))):
        try:
            text = file.read_bytes()
        except OSError as error:
            raise BuildError(f"cannot read {file}: {error.strerror}") from None
        digest.update(f"{file.name} {len(text)} ".encode() + text)
    digest.update("\0".join(command(name, Path(name))).encode())
    output = CACHE / digest.hexdigest()[:16] / (f"{name}.so" if name in LIBRARIES else name)
    if not output.exists():
        _compile(name, output)
    return output


def _compile(name: str, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may compile at once: each into a name of its own, and the rename decides.
        handle, scratch = tempfile.mkstemp(prefix=f".{name}-", dir=output.parent)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"cannot write below {CACHE}: {error.strerror}; run as root") from None
    try:
        words = command(name, Path(scratch))
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"{name} does not compile\n  command: {' '.join(words)}\n{run.stderr.strip()}")
        os.chmod(scratch, 0o755)
        os.replace(scratch, output)
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)
