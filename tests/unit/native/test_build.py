"""Invariants: a change of any source or header is recompiled; parts of a library are not compiled by themselves; the
bridge exports names of the C library and no others; every C file gets into an installed package."""

from __future__ import annotations

import ctypes
import subprocess
import tomllib
from pathlib import Path

import pytest

from softroce_ext.native import build

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program of two parts and a header, and one of a single source."""
    sources = tmp_path / "native"
    (sources / "pair").mkdir(parents=True)
    (sources / "pair" / "pair.h").write_text('#include <stdio.h>\n#define GREETING "one"\nvoid greet(void);\n')
    (sources / "pair" / "a.c").write_text('#include "pair.h"\nint main(void) { greet(); return 0; }\n')
    (sources / "pair" / "b.c").write_text('#include "pair.h"\nvoid greet(void) { puts(GREETING); }\n')
    (sources / "single.c").write_text("int main(void) { return 7; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    return sources


def said(program: Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def test_parts_make_one_program_and_none_alone(folder: Path) -> None:
    assert build.names() == ["pair", "single"]
    assert said(build.path("pair")) == "one\n"
    assert subprocess.run([build.path("single")], check=False).returncode == 7
    with pytest.raises(build.BuildError, match="no C source named 'b'; there are: pair, single"):
        build.path("b")


@pytest.mark.parametrize("file", ["pair.h", "b.c"])
def test_a_change_of_any_file_is_compiled_again(folder: Path, file: str) -> None:
    first = build.path("pair")
    assert build.path("pair") == first
    changed = folder / "pair" / file
    changed.write_text(changed.read_text().replace('"one"', '"two"').replace("puts(GREETING)", 'puts("two")'))
    second = build.path("pair")
    assert (said(first), said(second)) == ("one\n", "two\n")


def test_what_does_not_compile_is_named(folder: Path) -> None:
    (folder / "pair" / "b.c").write_text("this is no C\n")
    with pytest.raises(build.BuildError, match=r"pair does not compile\n  command: .*b\.c"):
        build.path("pair")
    assert not list(build.CACHE.glob("*/*")), "a half-made file is left"


@pytest.mark.parametrize("name", build.names())
def test_no_warnings(name: str, tmp_path: Path) -> None:
    subprocess.run([*build.command(name, tmp_path / name), "-Werror"], check=True)


def test_the_bridge_exports_names_of_the_c_library_only() -> None:
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", build.path("bridge")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    exported = {line.split()[-1].partition("@")[0] for line in lines}
    assert {"open", "write", "close", "dup2", "fcntl", "fstat", "socket"} <= exported
    assert [name for name in exported if not hasattr(ctypes.CDLL(None), name)] == []


def test_every_c_file_is_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "softroce_ext"
    packaged = {path for pattern in data["softroce_ext"] for path in package.glob(pattern)}
    files = {path for path in (package / "native").rglob("*") if path.suffix in (".c", ".h")}
    assert len(files) > 5 and files <= packaged
