"""What a program leaves in its folder is removed, however deep it is.

Invariants: nothing of it stays, nothing outside of it goes, nothing is raised, and depth costs no descriptors.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softroce_ext.process.nic import clear
from softroce_ext.uverbs import removal
from softroce_ext.uverbs.removal import remove_tree
from tests.support.nic.uverbs_program import Program, Upper

DEEP = 1100
"""Deeper than Python recurses, and beyond the longest path."""


def nest(top: Path, depth: int) -> None:
    """Folders in folders, with a file in each."""
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder))
        os.mkdir("nested", dir_fd=folder)
        inner = os.open("nested", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A folder; rm takes away what a test that fails leaves, since pytest's own removal recurses."""
    path = tmp_path / "tree"
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", "--", path], check=True)


def test_a_program_that_ends_with_a_deep_tree(tree: Path) -> None:
    (tree / "ctx").mkdir()
    upper = Upper(tree)
    program = Program(upper)
    nest(program.directory, DEEP)
    upper.adapter.forget(program.context)
    assert not program.directory.exists()
    upper.close()


def test_what_a_killed_nic_left(tree: Path) -> None:
    (tree / "ctx").mkdir()
    nest(tree / "ctx", DEEP)
    clear(tree)
    assert not (tree / "ctx").exists()


def test_depth_costs_no_descriptors(tree: Path) -> None:
    nest(tree, 50)
    (tree / "wide").mkdir()
    for number in range(5):
        (tree / "wide" / str(number)).mkdir()
        nest(tree / "wide" / str(number), 3)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    try:
        remove_tree(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not tree.exists()


def test_links_are_removed_and_not_followed(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tree / "in").mkdir()
    for place in (tree / "link", tree / "in" / "link"):
        place.symlink_to(outside)
    remove_tree(tree)
    assert not tree.exists()
    tree.symlink_to(outside)
    remove_tree(tree)
    assert (outside / "kept").exists()
    tree.unlink()
    remove_tree(tree)  # nothing is there


def test_a_folder_that_becomes_a_link_meanwhile(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's child lives on and exchanges a folder right before it is opened."""
    outside, hidden = tmp_path / "outside", tmp_path / "hidden"
    outside.mkdir()
    (outside / "kept").touch()
    (tree / "in" / "deeper").mkdir(parents=True)
    real = os.open

    def exchanging(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "in" and not hidden.exists():
            (tree / "in").rename(hidden)
            (tree / "in").symlink_to(outside)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(removal.os, "open", exchanging)
    remove_tree(tree)
    assert hidden.exists()
    assert (outside / "kept").exists()
    assert not tree.exists()


def test_it_ends_even_if_somebody_goes_on_filling(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each thing that goes a new one comes."""
    monkeypatch.setattr(removal, "MOST", 100)
    (tree / "0").touch()
    real, removed = os.unlink, []

    def refilling(path: Any, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        removed.append(path)
        assert len(removed) <= 100
        os.close(os.open(str(len(removed)), os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=dir_fd))

    monkeypatch.setattr(removal.os, "unlink", refilling)
    remove_tree(tree)
    assert removed
    assert tree.exists()


def test_an_empty_folder_goes_without_a_descriptor(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that could not be taken in for want of one."""

    def none_left(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(removal.os, "open", none_left)
    empty = tree / "empty"
    empty.mkdir()
    remove_tree(empty)
    assert not empty.exists()
