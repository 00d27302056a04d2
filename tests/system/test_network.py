"""The network on real parts: Mininet, Open vSwitch, the controller's own process, sshd.

Invariants: every host reaches every other with whole 9000-byte packets; no burst that a NIC sends is lost on the way; a
bandwidth is what was asked for; a moved address loses no packet, and once the move is confirmed none reaches the old
host; flows outlive the controller.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from testbed.base.errors import RunFailed
from testbed.base.ip6 import companion
from testbed.network import Network, machine
from testbed.network.machine import command
from tests.system.networks import PAIR, RING, running


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with running(RING, tmp_path_factory.mktemp("ring")) as network:
        yield network


def test_hosts_reach_each_other_with_whole_packets(ring: Network) -> None:
    """8972 bytes of payload and 28 of headers, never fragmented, over host and node addresses."""
    for a, b in itertools.permutations(ring.hosts.values(), 2):
        for ip in (b.ip, b.node_ip):
            a.run(["ping", "-c", "1", "-W", "5", "-M", "do", "-s", "8972", ip])


def test_the_datapath_is_what_the_kernel_can_do(ring: Network) -> None:
    in_kernel, _ = machine.kernel_datapath()
    kinds = {
        command("ovs-vsctl", "get", "bridge", name, "datapath_type").strip() for name in ring.plan.bridges.values()
    }
    assert ring.datapath == ("kernel" if in_kernel else "userspace")
    assert kinds == ({'""'} if in_kernel else {"netdev"})
    assert in_kernel == (not any(limit["wanted"] == "OVS kernel datapath" for limit in ring.limits))


def test_offloads_are_off_at_both_ends(ring: Network) -> None:
    for wire in ring.plan.wires:
        for end in (wire.a, wire.b):
            pid = None if end.port else ring.hosts[end.node].pid
            features = command("ethtool", "-k", end.interface, pid=pid)
            for name in ("tx-checksumming", "tcp-segmentation-offload", "generic-receive-offload"):
                assert f"{name}: off" in features, (end.interface, name)


def test_ipv6_is_where_it_is_wanted_only(ring: Network) -> None:
    """The address beside the host's own, and the link's; none at the switches' ends, whose noise would be captured."""
    for host in ring.hosts.values():
        shown = host.run(["ip", "-6", "-brief", "address", "show", "dev", host.interface]).stdout.split()[2:]
        assert [address for address in shown if not address.startswith("fe80:")] == [f"{companion(host.ip)}/64"]
    for wire in ring.plan.wires:
        for end in (wire.a, wire.b):
            if end.port:
                assert "inet6" not in command("ip", "address", "show", "dev", end.interface)


def test_every_host_reaches_every_other_by_ipv6(ring: Network) -> None:
    """The controller answers neighbour discovery; each host asks once."""
    for host in ring.hosts.values():
        for other in ring.hosts.values():
            if other is not host:
                assert " 0% packet loss" in host.run(["ping", "-6", "-c", "1", "-W", "5", companion(other.ip)]).stdout


def test_each_host_has_a_private_folder(ring: Network) -> None:
    one, other = list(ring.hosts.values())[:2]
    one.run(["touch", "/run/migros/mine"])
    assert one.run(["ls", "/run/migros"]).stdout.split() == ["mine"]
    assert other.run(["ls", "/run/migros"]).stdout == ""
    assert os.listdir("/run/migros") == []
    one.run(["rm", "/run/migros/mine"])


def test_ssh_with_the_run_s_keys_and_no_others(ring: Network) -> None:
    host = ring.hosts["h2"]
    kind, key = ring.access.host_key.split()
    with paramiko.SSHClient() as client:
        client.get_host_keys().add(host.mgmt_ip, kind, paramiko.Ed25519Key(data=base64.b64decode(key)))
        client.connect(
            host.mgmt_ip, username="root", key_filename=str(ring.access.key), allow_agent=False, look_for_keys=False
        )
        _, out, _ = client.exec_command("ip -brief address show; echo $MIGROS_TESTBED_RUN")
        text = out.read().decode()
    assert host.ip in text and "h2-eth0" in text and "h1-eth0" not in text
    assert text.split()[-1] == ring.state.run_id
    with paramiko.SSHClient() as client, pytest.raises(paramiko.SSHException):
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        wrong = paramiko.ECDSAKey.generate()
        client.connect(host.mgmt_ip, username="root", pkey=wrong, allow_agent=False, look_for_keys=False)


COUNT = """
import socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: this end shall not be the one that drops
s.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS: when the kernel got it, not when this process was scheduled
s.bind(("", 5555)); s.settimeout(20)
print("listening", flush=True)
count, last = 0, 0.0
try:
    while True:
        data, extra, _, _ = s.recvmsg(9000, 64)
        if data == b"end":
            break
        seconds, nanoseconds = struct.unpack("qq", extra[0][2])
        count, last = count + 1, seconds + nanoseconds / 1e9
except TimeoutError:
    pass
print(count, last - time.time() + time.monotonic())
"""
SEND = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 32, 64 << 20)
s.connect((sys.argv[1], 5555))
for _ in range(20):
    for _ in range(64):
        s.send(bytes(4158))
    time.sleep(0.03)
"""
STREAM = """
import select, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 5555))
count = 0
while not select.select([sys.stdin], [], [], 0.0002)[0]:  # until the other side closes it
    s.send(bytes(1000))
    count += 1
    if count == 100:
        print("sending", flush=True)
print(count)
"""
END = "import socket,sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'end', (sys.argv[1], 5555))"


def test_bursts_arrive_whole(ring: Network) -> None:
    """64 frames of 4200 bytes at once, as the NIC sends them, over two switches. With the kernel's usual receive buffer
    more than half is lost in front of the userspace datapath."""
    sender, receiver = ring.hosts["h1"], ring.hosts["h2"]
    sender.run(["ping", "-c", "1", receiver.ip])
    counting = receiver.popen([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, text=True)
    assert counting.stdout is not None and counting.stdout.readline()
    sender.run([sys.executable, "-c", SEND, receiver.ip])
    sender.run([sys.executable, "-c", END, receiver.ip])
    assert int(counting.communicate()[0].split()[0]) == 20 * 64


def test_a_moved_address_loses_nothing_and_is_confirmed_when_it_is_true(ring: Network) -> None:
    """h2's address is given to h4 as well; packets from h1 are counted at both while the controller moves it. All
    arrive; none gets to h2 after `confirmed_at` (2 ms are for the kernel's own deferred work on a busy machine)."""
    sender, old, new = (ring.hosts[name] for name in ("h1", "h2", "h4"))
    assert ring.controller.path_of("h1", old.ip) == ["h1", "s1", "s2", "h2"]
    new.run(["ip", "address", "add", f"{old.ip}/32", "dev", new.interface])
    try:
        counting = [host.popen([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, text=True) for host in (old, new)]
        for process in counting:
            assert process.stdout is not None and process.stdout.readline()
        sending = sender.popen(
            [sys.executable, "-c", STREAM, old.ip], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert sending.stdout is not None and sending.stdout.readline()
        prepared = ring.controller.prepare_move(old.ip, "h4")
        assert {flow["action"] for flow in prepared["flows"]} == {"added"}
        assert ring.controller.path_of("h1", old.ip)[-1] == "h2"
        moved = ring.controller.move(old.ip, "h4")
        assert ring.controller.path_of("h1", old.ip)[-1] == "h4"
        time.sleep(0.2)
        sent = int(sending.communicate()[0])
        sender.run([sys.executable, "-c", END, old.ip])  # by now this reaches the new host
        new.run([sys.executable, "-c", END, old.node_ip])  # the old one by an address that has not moved
        at_old, at_new = (process.communicate()[0].split() for process in counting)
    finally:
        back = ring.controller.undo_move(old.ip)
        new.run(["ip", "address", "delete", f"{old.ip}/32", "dev", new.interface])
    assert {flow["action"] for flow in moved["flows"]} == {"removed"}
    assert all(moved["begun_at"] <= flow["t"] <= moved["confirmed_at"] for flow in moved["flows"])
    assert int(at_old[0]) + int(at_new[0]) == sent
    assert int(at_old[0]) > 0 and int(at_new[0]) > 0
    assert float(at_old[1]) < moved["confirmed_at"] + 0.002
    assert back["flows"] and ring.controller.path_of("h1", old.ip) == ["h1", "s1", "s2", "h2"]
    sender.run(["ping", "-c", "2", "-i", "0.1", "-W", "5", old.ip])


def test_a_withdrawn_preparation_changes_nothing(ring: Network) -> None:
    before = ring.controller.status()["flows"]
    ring.controller.prepare_move(ring.hosts["h2"].ip, "h3")
    assert ring.controller.status()["flows"] > before
    ring.controller.undo_move(ring.hosts["h2"].ip)
    assert ring.controller.status()["flows"] == before


def test_an_undo_is_undone_once(ring: Network) -> None:
    """The second call finds nothing; nor does one after a move that was refused."""
    ip = ring.hosts["h3"].ip
    ring.controller.move(ip, "h1")
    assert ring.controller.undo_move(ip)["flows"]
    assert ring.controller.undo_move(ip)["flows"] == []
    with pytest.raises(RunFailed, match="no host"):
        ring.controller.prepare_move(ip, "h9")
    assert ring.controller.undo_move(ip)["flows"] == []
    assert ring.controller.path_of("h2", ip) == ["h2", "s2", "s3", "h3"]


def test_an_address_can_be_added(ring: Network) -> None:
    host = ring.hosts["h3"]
    host.run(["ip", "address", "add", "10.0.200.1/32", "dev", host.interface])
    assert ring.hosts["h1"].run(["ping", "-c", "1", "-W", "1", "10.0.200.1"], check=False).returncode != 0
    ring.controller.add_address("10.0.200.1", "h3")
    ring.hosts["h1"].run(["ping", "-c", "1", "-W", "5", "10.0.200.1"])


def test_a_wrong_request_is_refused_and_harms_nothing(ring: Network) -> None:
    with pytest.raises(RunFailed, match="no host 'h9'"):
        ring.controller.move(ring.hosts["h1"].ip, "h9")
    ring.hosts["h2"].run(["ping", "-c", "1", "-W", "5", ring.hosts["h1"].ip])


def iperf3(client: str, server: str, network: Network, seconds: int = 2) -> float:
    """Mbit/s of TCP, as received."""
    listener = network.hosts[server].popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not network.hosts[server].run(["ss", "-Hltn", "sport = :5201"]).stdout:
        assert listener.poll() is None and time.monotonic() < deadline, "iperf3 does not listen"
        time.sleep(0.05)
    out = network.hosts[client].run(["iperf3", "-J", "-t", str(seconds), "-c", network.hosts[server].ip]).stdout
    listener.wait(10)
    return float(json.loads(out)["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_bandwidth_is_what_was_asked_for(tmp_path: Path) -> None:
    """Slow enough for any machine: 50 Mbit/s, each way. Headers take a share; no more than asked comes through."""
    with running(PAIR.replace("BW", "50"), tmp_path) as network:
        for client, server in (("h1", "h2"), ("h2", "h1")):
            assert 40 < iperf3(client, server, network) <= 51


def test_bandwidth_above_a_gigabit_is_in_the_kernel(tmp_path: Path) -> None:
    """Mininet's own drops it without a word. Whether the machine's CPU reaches it is another matter."""
    with running(PAIR.replace("BW", "2500"), tmp_path) as network:
        wire = network.plan.wires[1]
        for end in (wire.a, wire.b):
            pid = None if end.port else network.hosts[end.node].pid
            (bucket,) = json.loads(command("tc", "-json", "qdisc", "show", "dev", end.interface, "root", pid=pid))
            assert (bucket["kind"], bucket["options"]["rate"] * 8) == ("tbf", 2_500_000_000)


def test_traffic_goes_on_without_the_controller(tmp_path: Path) -> None:
    with running(PAIR.replace("BW", "1000"), tmp_path) as network:
        one, other = network.hosts["h1"], network.hosts["h2"]
        one.run(["ping", "-c", "1", "-W", "5", other.ip])
        process = network._controller_process
        assert process is not None
        process.stop()
        time.sleep(1.5)
        one.run(["ping", "-c", "3", "-i", "0.2", "-W", "5", other.ip])
        with pytest.raises(RunFailed, match="does not answer"):
            network.controller.status()


def test_the_same_application_runs_on_os_ken(tmp_path: Path) -> None:
    """Everywhere else in this file it is Ryu where that is installed (Python < 3.12)."""
    with running(RING.replace("name: ring", "name: ring\ncontroller: os-ken"), tmp_path) as network:
        assert network.controller_version.startswith("os-ken ")
        for a, b in itertools.permutations(network.hosts.values(), 2):
            a.run(["ping", "-c", "1", "-W", "5", b.ip])
        moved = network.controller.move(network.hosts["h2"].ip, "h4")
        assert {flow["switch"] for flow in moved["flows"]} == set(network.plan.bridges)
        assert network.controller.path_of("h3", network.hosts["h2"].ip) == ["h3", "s3", "s4", "h4"]


def test_two_runs_at_a_time_do_not_meet(ring: Network, tmp_path: Path) -> None:
    """The same topology once more, with the same addresses and datapath ids, beside the first one."""
    with running(RING, tmp_path) as second:
        assert not set(second.plan.bridges.values()) & set(ring.plan.bridges.values())
        for network in (ring, second):
            network.hosts["h1"].run(["ping", "-c", "1", "-W", "5", network.hosts["h3"].ip])
        second.controller.move(second.hosts["h2"].ip, "h3")
        assert ring.controller.path_of("h1", ring.hosts["h2"].ip)[-1] == "h2"
    ring.hosts["h1"].run(["ping", "-c", "1", "-W", "5", ring.hosts["h2"].ip])


def test_the_controller_is_reachable_from_this_machine_only(ring: Network) -> None:
    """OpenFlow listens on loopback; the northbound socket is root's."""
    process = ring._controller_process
    assert process is not None
    listening = command("ss", "-Hltn", f"sport = :{process.openflow_port}").split()
    assert listening[3] == f"127.0.0.1:{process.openflow_port}"
    assert process.socket.stat().st_mode & 0o077 == 0
