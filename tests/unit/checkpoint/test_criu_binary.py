"""Which CRIU is taken: the first that is new enough and passes its check; a choice by the user is never replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.base.errors import EnvironmentProblem
from testbed.checkpoint import criu_binary


def fake(path: Path, version: str, check: int = 0, says: str = "Looks good.") -> Path:
    """A program that answers as CRIU does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "Version: {version}";; '
        f'check) echo "{says}" >&2; exit {check};; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TESTBED_CRIU", raising=False)
    monkeypatch.setattr(criu_binary.shutil, "which", lambda *_args, **_kw: None)
    criu_binary._usable.cache_clear()


def test_the_user_s_choice_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = fake(tmp_path / "own criu", "4.3")
    monkeypatch.setenv("TESTBED_CRIU", f"'{chosen}'")
    found = criu_binary.usable(tmp_path / "none")
    assert (found.command, found.version, found.origin) == ((str(chosen),), (4, 3), "$TESTBED_CRIU")


def test_the_user_s_choice_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = fake(tmp_path / "system", "9.9")
    monkeypatch.setattr(criu_binary.shutil, "which", lambda *_args, **_kw: str(system))
    monkeypatch.setenv("TESTBED_CRIU", "/does/not/exist")
    with pytest.raises(EnvironmentProblem, match=r"TESTBED_CRIU: cannot be started"):
        criu_binary.usable(tmp_path / "none")


@pytest.mark.parametrize(
    ("version", "check", "says", "why"),
    [
        ("3.17.1", 0, "Looks good.", "3.17.1 is older than 4.2"),
        ("4.1.1", 0, "Looks good.", "4.1.1 is older than 4.2"),
        ("4.2", 1, "Error (criu/vdso.c): vdso: Unexpected rt vDSO area bounds", "Unexpected rt vDSO"),
        ("nonsense", 0, "", "is not CRIU"),
    ],
)
def test_one_that_will_not_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, check: int, says: str, why: str
) -> None:
    system = fake(tmp_path / "criu", version, check, says)
    monkeypatch.setattr(criu_binary.shutil, "which", lambda *_args, **_kw: str(system))
    with pytest.raises(EnvironmentProblem, match="no CRIU works here") as caught:
        criu_binary.usable(tmp_path / "none")
    assert why in caught.value.message
    assert "bootstrap" in (caught.value.hint or "")


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="none is installed"):
        criu_binary.usable(tmp_path / "none")


def test_a_prefix_is_started_through_its_own_loader(tmp_path: Path) -> None:
    fake(tmp_path / "usr/sbin/criu", "4.2.1")
    assert criu_binary.prefix_command(tmp_path) is None, "without a loader it would run with the system's libc"
    loader = fake(tmp_path / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "4.2.1")
    assert criu_binary.prefix_command(tmp_path) == [
        str(loader), "--library-path", str(loader.parent), str(tmp_path / "usr/sbin/criu"),
    ]  # fmt: skip
