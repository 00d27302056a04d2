"""Compile a C source of this folder on demand, once per content.

The output's folder is named after a hash of the source, the flags and the compiler's version, so a changed source is
compiled anew and an unchanged one is found in microseconds. It lies outside the source tree because a checkpointed
program maps the library: the path must be the same at every host and stay while the program lives.
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

# What a source becomes: a library to be loaded (LD_PRELOAD or CRIU's -L), or a program. A new source needs a line.
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


def command(name: str, output: Path) -> list[str]:
    """Return the compiler's command line for `<name>.c`, writing to `output`."""
    kind = SHARED_FLAGS if name in LIBRARIES else ()
    return [compiler(), *COMMON_FLAGS, *kind, "-o", str(output), str(SOURCES / f"{name}.c"), *LINK.get(name, ())]


def path(name: str) -> Path:
    """Return the compiled `<name>.c`, compiling it when this content was never compiled. Raises BuildError."""
    source = SOURCES / f"{name}.c"
    try:
        text = source.read_bytes()
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in SOURCES.glob("*.c")))
        raise BuildError(f"no C source named {name!r} ({error.strerror}); there are: {known}") from None
    digest = hashlib.sha256(text)
    for header in sorted(SOURCES.glob("*.h")):
        digest.update(header.read_bytes())
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
            raise BuildError(f"{name}.c does not compile\n  command: {' '.join(words)}\n{run.stderr.strip()}")
        os.chmod(scratch, 0o755)
        os.replace(scratch, output)
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)
