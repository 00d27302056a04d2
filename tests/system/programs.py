"""What runs on the hosts: how a module of this folder is started there, and plain programs that CRIU moves.

The plain ones say themselves whether something was lost.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
"""The distribution's Python, for which Debian packages pyverbs: the programs of tests use nothing else."""


def module(name: str, *words: str, python: str = PYTHON) -> list[str]:
    """A command line that runs `tests.system.NAME` on any host of this machine, whatever its current folder is."""
    return ["/usr/bin/env", f"PYTHONPATH={ROOT}", python, "-m", f"tests.system.{name}", *words]


# Prints consecutive numbers, one every 2 ms.
COUNTER = """
#include <stdio.h>
#include <unistd.h>
int main(void) { for (long i = 0;; i++) { printf("%ld\\n", i); fflush(stdout); usleep(2000); } }
"""

# Accepts one connection and returns every line; ends with 0 at the end of the stream, 1 on an error such as a reset.
ECHO_SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7777))
connection, _ = listener.accept()
try:
    while data := connection.recv(65536):
        connection.sendall(data)
except OSError as error:
    print(error)
    sys.exit(1)
print("end of stream")
"""

# Sends numbered lines as fast as they come back, until SIGTERM; says `talking` on standard error once some have, and
# prints at the end how many, and the longest wait in ms. Ends with 0 only if every line came back whole and in order.
ECHO_CLIENT = """
import signal, socket, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
connection = socket.create_connection((sys.argv[1], 7777))
connection.settimeout(30)
lines = connection.makefile("rb")
number, longest = 0, 0.0
while not told:
    started = time.monotonic()
    text = b"%d %s\\n" % (number, b"x" * (number % 1000))
    connection.sendall(text)
    if lines.readline() != text:
        sys.exit(f"line {number} came back changed, or the connection ended")
    longest = max(longest, time.monotonic() - started)
    number += 1
    if number == 50:
        print("talking", file=sys.stderr, flush=True)
connection.shutdown(socket.SHUT_WR)
if lines.readline() != b"":
    sys.exit("something came after the last line")
print(number, round(longest * 1000))
"""


def compile_c(source: str, folder: Path, name: str) -> str:
    """Path of a compiled C program."""
    text = folder / f"{name}.c"
    text.write_text(source)
    output = folder / name
    subprocess.run(["cc", "-O2", "-o", str(output), str(text)], check=True)
    return str(output)


def assert_consecutive(text: str) -> int:
    """Every number from 0 on, once, in order; how many. The last line may have been read while it was written."""
    numbers = [int(line) for line in text.split("\n")[:-1]]
    assert numbers == list(range(len(numbers))), "the counter lost or repeated a line"
    return len(numbers)
