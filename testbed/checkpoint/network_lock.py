"""What CRIU leaves at the source of moved TCP connections: a netfilter table that drops their segments.

After a commit the lock is useful until the address has left the source: a late segment would otherwise meet no socket
and be answered with a reset that kills the moved connection. Then it is removed.
"""

from __future__ import annotations

import subprocess


def remove(table: str) -> bool:
    """Remove a table, named as `nft` names it ("inet CRIU-…"), from this network namespace; whether it was there."""
    try:
        answer = subprocess.run(
            ["nft", "delete", "table", *table.split()], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError:
        return False  # without nft there is no lock either: CRIU's dump would have failed
    return answer.returncode == 0
