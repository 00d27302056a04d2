"""Removes a folder that belonged to a program, with everything that the program has put there.

A program can nest folders deeper than Python recurses, deeper than a process may have descriptors, and deeper than any
path reaches; and its children can exchange a folder for a link while it is being removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MOST: Final = 1 << 20
"""Entries that one removal visits, at most: a program that keeps making new ones must not keep it busy."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove the folder `path` and everything below it, as far as that is possible; never raises OSError.

    Folders in folders are moved up to the top until none is left, so depth costs neither stack nor descriptors, and
    everything is named by the descriptor of the folder that it is in, so no link is followed.
    """
    with contextlib.suppress(OSError):
        top = os.open(path, _FOLDER)
        try:
            steps = iter(range(MOST))
            while _clear(top, top, steps):
                pass
        finally:
            os.close(top)
    with contextlib.suppress(OSError):
        path.rmdir()  # also when no descriptor was left to open it: it may be empty


def _clear(folder: int, top: int, steps: Iterator[int]) -> bool:
    """Remove what is in `folder`, or move it up to `top`. Whether anything was removed or moved."""
    gone = False
    with os.scandir(folder) as entries:
        for _, entry in zip(steps, entries, strict=False):
            try:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=folder)
                elif folder != top:
                    _remove_or_lift(folder, entry.name, top)
                else:
                    gone |= _hollow(top, entry.name, steps)
                    os.rmdir(entry.name, dir_fd=top)
                gone = True
            except (NotADirectoryError, IsADirectoryError):
                gone = True  # it has been replaced meanwhile: try again
            except OSError:
                continue  # it is in use, or not permitted: remove the others
    return gone


def _hollow(top: int, name: str, steps: Iterator[int]) -> bool:
    """Empty the folder `name` of `top`. Whether anything was removed or moved."""
    inner = os.open(name, _FOLDER, dir_fd=top)
    try:
        return _clear(inner, top, steps)
    finally:
        os.close(inner)


def _remove_or_lift(folder: int, name: str, top: int) -> None:
    try:
        os.rmdir(name, dir_fd=folder)
    except OSError:  # it is not empty
        os.rename(name, secrets.token_hex(8), src_dir_fd=folder, dst_dir_fd=top)
