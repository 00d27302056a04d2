"""Many programs, dying programs, lossy links: what others notice of it.

Invariants: a program that dies takes its objects along and nothing else; its partner gets the error of its service;
programs on one device do not disturb each other; nothing is left when they have gone; a counter that is added to by
atomics is exact whatever the link loses.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.interop.lab import lab
from tests.system import programs
from tests.system.nic_pair import RUN, TOO_EARLY, Host, finish, nics, pair, until

TCP_PORT = 18600
RPING = ["rping", "-c", "-C", "100000", "-a"]
AT_ONCE = ["sh", "-c", 'read -r line; exec "$@"', "sh"]
"""Prefix of programs that wait for the end of their input, so that none is through before the last one is started."""
RETRIES = ["ib_write_bw", "-R", "-x", "1", "-F", "-D", "60", "-s", "65536", "-p", "18701", "--retry_count=2"]


def traffic(mode: str, seconds: int) -> list[str]:
    """The command line of a program that checks numbered traffic; the client's gets the server's address besides."""
    return programs.module("verbs_traffic", mode, str(seconds))


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs."""
    with nics() as both:
        yield both


def contexts(host: Host) -> list[dict[str, Any]]:
    """What programs have open."""
    with host.control() as control:
        return [dict(context) for context in control.call("status")["contexts"]]


def nothing_left(host: Host) -> None:
    """No object, no file, no queue pair in the engine."""
    until(lambda: contexts(host) == [], f"everything of host {host.number} freed", 30)
    assert os.listdir(host.path(f"{RUN}/ctx")) == []


def streaming(
    server: Host, client: Host, words: list[str], port: int
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """A server and a client between which data flow; port: the server's over TCP, 0: it uses rdma_cm."""
    listening = server.start(*words)
    if port:
        server.wait_for_listener(port, listening)
    else:
        server.wait_for_cm_listener(listening)
    before = server.received()
    calling = client.start(*(RPING if words[0] == "rping" else words), server.ip)
    until(lambda: server.received() > before + 300 or calling.poll() is not None, "traffic", 30)
    if calling.poll() is not None:
        _, output = finish(calling)
        assert TOO_EARLY in output, output
        listening.kill()
        finish(listening)
        return streaming(server, client, words, port)
    return listening, calling


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (traffic("doomed", 60), "ok "),
        (RETRIES, "Failed status 12"),
        (["rping", "-s", "-C", "100000"], "DISCONNECT"),
    ],
    ids=["pyverbs", "perftest", "rping"],
)
def test_a_partner_of_a_killed_program_is_told(joined: tuple[Host, Host], words: list[str], told: str) -> None:
    """SIGKILL in mid-stream: RETRY_EXC_ERR at the other end (with rdma_cm's connections perhaps the DREQ first)."""
    server, client = joined
    listening, calling = streaming(server, client, words, TCP_PORT if told == "ok " else 0)
    (victim,) = [context for context in contexts(server) if context["mrs"]]
    os.kill(int(victim["pid"]), signal.SIGKILL)
    finish(listening, 10)
    nothing_left(server)
    code, output = finish(calling, 10 if words[0] == "rping" else 60)
    assert told in output, output
    # rping may never end then: a receive that it posts after its queue pair has failed rings no bell (as with rxe).
    assert words[0] == "rping" or (code == 0) == (words[0] != "ib_write_bw"), output
    nothing_left(client)
    for code, output in pair(server, client, ["ibv_rc_pingpong", "-g", "1", "-n", "50", "-c"]):
        assert code == 0, output


def test_what_was_posted_goes_out_before_all_is_freed(joined: tuple[Host, Host]) -> None:
    """The NIC sleeps while a program posts eight datagrams and frees everything: all of them come, in order, whole."""
    server, client = joined
    assert client.nic is not None
    listening = server.start(*traffic("leaver", 0))
    calling = client.start(*traffic("leaver", 0), server.ip, stdin=subprocess.PIPE)
    assert calling.stdin is not None
    assert calling.stdout is not None
    assert calling.stdout.readline() == "ready\n"
    os.kill(client.nic.pid, signal.SIGSTOP)
    try:
        calling.stdin.write("go\n")
        calling.stdin.flush()
        assert calling.stdout.readline() == "posted\n"
        time.sleep(0.2)
    finally:
        os.kill(client.nic.pid, signal.SIGCONT)
    for process in (calling, listening):
        code, output = finish(process)
        assert (code, output.splitlines()[-1:]) == (0, ["ok 8"]), output


def test_forty_programs_at_once(joined: tuple[Host, Host]) -> None:
    """Sixteen pairs of pingpongs with their own check, two of perftest, two that count: all intact, nothing left."""
    ports = iter(range(18800, 18900))
    pingpong = ["ibv_rc_pingpong", "-g", "1", "-c", "-e", "-n", "1000", "-s", "9000"]
    commands = [[*pingpong, "-p", str(next(ports))] for _ in range(16)]
    commands += [["ib_send_bw", "-x", "1", "-F", "-n", "2000", "-e", "-p", str(next(ports))] for _ in range(2)]
    running = []
    for number, words in enumerate(commands):
        server, client = joined[:: 1 if number % 2 else -1]
        running.append((server.start(*words), server, client, words))
    for process, server, _, words in running:
        server.wait_for_listener(int(words[-1]), process)
    gate, opener = os.pipe()
    calling = [client.start(*AT_ONCE, *words, server.ip, stdin=gate) for _, server, client, words in running]
    # Both use the same TCP port, each on the other host.
    counting = [host.start(*traffic(mode, 2)) for host, mode in zip(joined, ("adder", "shared"), strict=True)]
    calling += [
        other.start(*AT_ONCE, *traffic(mode, 2), host.ip, stdin=gate)
        for host, other, mode in zip(joined, reversed(joined), ("adder", "shared"), strict=True)
    ]
    os.close(gate)
    os.close(opener)
    most = 0
    while most < 16 and all(process.poll() is None for process in calling):
        most = max(most, len(contexts(joined[0])))
        time.sleep(0.02)
    for process in [*calling, *(entry[0] for entry in running), *counting]:
        code, output = finish(process, 120)
        assert code == 0, output
        assert "invalid data" not in output
    assert most >= 16, "they did not run at the same time"
    for host in joined:
        nothing_left(host)


def test_threads_post_and_poll_at_once(joined: tuple[Host, Host]) -> None:
    """Threads of one program, on queue pairs of their own and a common one, two others polling: all additions count."""
    run = joined[0].run(*programs.module("verbs_posting"), program=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr
    nothing_left(joined[0])


def test_a_program_with_a_child_after_ibv_fork_init(joined: tuple[Host, Host]) -> None:
    """The parent writes into pages that the child had a copy of: what is sent is what the parent wrote."""
    for code, output in pair(*joined, traffic("forked", 1), wait=False):
        assert code == 0 and output.startswith("ok "), output


@pytest.mark.parametrize("link", [{"loss": 0.02}, {"duplicate": 0.05}, {"reorder": 0.03, "loss": 0.01}], ids=str)
def test_atomics_are_exact_over_a_bad_link(link: dict[str, float]) -> None:
    """Behind a relay that loses, duplicates, reorders: each addition is done once, each returns the number before."""
    with lab(None) as place:
        place.prepare(1024)
        place.meet()
        place.cable.impair(**link, seed=7)
        server = place.b.start(*traffic("adder", 4))
        client = place.a.start(*traffic("adder", 4), place.b.ip4)
        (code, output), (other, told) = client.finish(60), server.finish(60)
        assert (code, other) == (0, 0), output + told
        assert output == told and int(output.split()[1]) > 50
        for words in (["ib_atomic_bw", "-x", "1", "-F", "-n", "300"], ["ib_atomic_lat", "-x", "1", "-F", "-n", "200"]):
            server = place.b.start(*words)
            assert place.b.listens(18515)
            client = place.a.start(*words, place.b.ip4)
            for program in (client, server):
                code, output = program.finish(90)
                assert code == 0, output
        counts = place.cable.counts()
        impaired = ("lost", "duplicated", "reordered")
        assert all(sum(way[name] for name in impaired) > 10 for way in counts), counts
