"""A host over real SSH: an sshd with the run's kind of keys, on the loopback interface.

Invariants: only the right key gets in, only the right host is talked to, and when the connection goes, whatever way,
the agent and all that it started go too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.base.errors import EnvironmentProblem, RunFailed
from testbed.lab.hosts import Host, connect_all
from testbed.lab.transport import Address
from testbed.network.ssh import configuration, make_keys

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder = tmp_path_factory.mktemp("ssh")
    access = make_keys(folder / "keys")
    # An address of its own: a port of 127.0.0.1 that is free now may be anybody's when sshd comes.
    ip = f"127.{100 + secrets.randbelow(100)}.{secrets.randbelow(256)}.{1 + secrets.randbelow(250)}"
    with socket.socket() as probe:
        probe.bind((ip, 0))
        port = probe.getsockname()[1]
    # The folders above a test's own are not writable by root only, which sshd would insist on.
    text = configuration(folder / "keys", ip, "ssh-test").replace(":22\n", f":{port}\n")
    (folder / "sshd_config").write_text(text.replace("StrictModes yes", "StrictModes no"))
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian's own, made by its service; other runs may need it after us
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    server = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    yield Address(
        name="h1",
        address=ip,
        port=port,
        interface="lo",
        key_file=access.key,
        host_key=access.host_key,
        root=str(folder / "root"),
        python=sys.executable,
        source=str(Path(__file__).resolve().parents[2]),
        environment={"MARK": "a b"},
    )
    server.terminate()
    server.wait()


def gone(pid: int, timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.02)
    return not os.path.exists(f"/proc/{pid}")


def test_agent_and_programs_over_ssh(address: Address) -> None:
    host = Host.connect(address)
    agent = host.about["pid"]
    assert b"MARK=a b" in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    init = host.call("start_app", name="a", argv=["sleep", "1000"], rdma=False)["init"]
    assert host.call("app_status", name="a")["init"] == init
    host.close()
    assert gone(agent) and gone(init)


def test_broken_connection_ends_the_agent_and_its_programs(address: Address) -> None:
    host = Host.connect(address)
    agent = host.about["pid"]
    init = host.call("start_app", name="a", argv=["sleep", "1000"], rdma=False)["init"]
    host._transport.close()  # no shutdown: what a killed testbed looks like from there
    assert gone(agent) and gone(init)
    with pytest.raises(RunFailed, match="the agent has gone"):
        host.call("app_status", name="a")


def test_all_connect_at_once_or_none(address: Address) -> None:
    hosts = connect_all(replace(address, name=f"h{i}", root=f"{address.root}{i}") for i in range(4))
    assert list(hosts) == ["h0", "h1", "h2", "h3"]
    agents = [host.about["pid"] for host in hosts.values()]
    for host in hosts.values():
        host.close()
    assert all(map(gone, agents))
    with pytest.raises(EnvironmentProblem, match="did not start") as caught:
        connect_all([address, replace(address, name="h2", python="/no/such/python")])
    assert "/no/such/python" in str(caught.value.hint)


def test_wrong_client_key(address: Address, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    with pytest.raises(EnvironmentProblem, match="SSH login refused") as caught:
        Host.connect(replace(address, key_file=tmp_path / "key"))
    assert caught.value.where == f"h1 (root@{address.address}:{address.port})"


def test_impostor_host(address: Address, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    other = " ".join((tmp_path / "key.pub").read_text().split()[:2])
    with pytest.raises(EnvironmentProblem, match="SSH login refused"):
        Host.connect(replace(address, host_key=other))


def test_no_server_listens(address: Address) -> None:
    with socket.socket() as probe:
        probe.bind((address.address, 0))
        with pytest.raises(EnvironmentProblem, match=r"no SSH connection within 0\.3 s") as caught:
            Host.connect(replace(address, port=probe.getsockname()[1]), timeout=0.3)
    assert "is sshd running" in str(caught.value.hint)
