"""What CRIU leaves at the source of moved TCP connections: a netfilter table that drops their segments.

After a commit the table is needed until the address has left the source: without it a late segment would find no socket
and be answered by a reset that ends the moved connection. Then the table is removed.
"""

from __future__ import annotations

import subprocess


def remove(table: str) -> bool:
    """Remove a table, by its name in `nft` ("inet CRIU-…"), from this network namespace. Returns whether it existed."""
    try:
        answer = subprocess.run(
            ["nft", "delete", "table", *table.split()], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError:
        return False  # without nft there is no lock: CRIU's dump would have failed
    return answer.returncode == 0
