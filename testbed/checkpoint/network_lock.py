"""What CRIU leaves in a network namespace after a checkpoint that moved TCP connections: tables that drop their segments.

After a commit the lock is useful until the address has left the source: a late segment would otherwise meet no socket
and be answered with a reset that kills the moved connection. Then it is flushed.
"""

from __future__ import annotations

import shutil
import subprocess


def tables() -> list[str]:
    """CRIU's netfilter tables in this network namespace, as `nft` names them ("inet CRIU-…"). Empty without nft."""
    if shutil.which("nft") is None:
        return []
    answer = subprocess.run(["nft", "list", "tables"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    words = [line.split(maxsplit=1) for line in answer.stdout.splitlines()]
    return [name for first, name in (pair for pair in words if len(pair) == 2) if first == "table" and " CRIU-" in name]


def flush() -> list[str]:
    """Remove CRIU's tables from this network namespace; their names. One that vanishes meanwhile is fine."""
    found = tables()
    for name in found:
        subprocess.run(
            ["nft", "delete", "table", *name.split()], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    return found
