"""The northbound interface and what it stands on: requests of any shape get an answer, never an exception."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import Ether

from testbed.base.errors import RunFailed
from testbed.controller import datapath, northbound
from testbed.controller.arp import ArpFrame, reply_to
from testbed.controller.client import ControllerClient
from testbed.controller.discovery import Solicitation, advertise
from testbed.controller.routes import RouteError


def move(ip: str, to_host: str) -> dict[str, Any]:
    if to_host == "h9":
        raise RouteError("no host 'h9'")
    if to_host == "h8":
        raise northbound.Unready("s1 is not connected")
    return {"confirmed_at": 1.5, "flows": []}


CALLS: dict[str, northbound.Call] = {"move": move, "status": lambda: {"ready": True, "missing": []}}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no op"),
        (b"\xff\xfe", "not JSON"),
        (b'{"op": 3}', "no op"),
        (b'{"op": "fly"}', "unknown op 'fly'"),
        (b'{"op": "move", "ip": "10.0.0.1"}', "missing a required argument: 'to_host'"),
        (b'{"op": "move", "ip": "10.0.0.1", "to_host": "h1", "fast": "yes"}', "unexpected keyword argument 'fast'"),
        (b'{"op": "move", "ip": 7, "to_host": "h1"}', "ip must be text"),
        (b'{"op": "move", "ip": "10.0.0.1", "to_host": "h9"}', "no host 'h9'"),
        (b'{"op": "move", "ip": "10.0.0.1", "to_host": "h8"}', "s1 is not connected"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(line: bytes, error: str) -> None:
    answer = northbound.answer(CALLS, line)
    assert answer["ok"] is False
    assert error in answer["error"]


def test_a_right_request_is_carried_out() -> None:
    answer = northbound.answer(CALLS, b'{"op": "move", "ip": "10.0.0.1", "to_host": "h2"}')
    assert answer == {"ok": True, "confirmed_at": 1.5, "flows": []}


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_line_gets_an_answer(line: bytes) -> None:
    """Invariant: one JSON object with a boolean `ok`, whatever came in."""
    assert isinstance(json.loads(json.dumps(northbound.answer(CALLS, line)))["ok"], bool)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "n.sock"
    listener = northbound.listen(path)

    def spawn(target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    spawn(northbound.serve, listener, CALLS, spawn)
    return path


def test_the_socket_is_its_owners_alone(served: Path) -> None:
    mode = os.stat(served).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_client_and_server_talk(served: Path) -> None:
    with ControllerClient(served) as client:
        assert client.wait_ready(1.0)["ready"] is True
        assert client.move("10.0.0.1", "h2") == {"confirmed_at": 1.5, "flows": []}
        with pytest.raises(RunFailed, match="no host 'h9'"):
            client.move("10.0.0.1", "h9")
        assert client.status()["missing"] == [], "a refusal does not end the conversation"


def test_a_client_that_hangs_up_disturbs_no_other(served: Path) -> None:
    rude = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    rude.connect(str(served))
    rude.sendall(b'{"op": "sta')
    rude.close()
    with ControllerClient(served) as client:
        assert client.status()["ready"] is True


def test_a_dead_controller_is_said_to_be_dead(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="does not answer"), ControllerClient(tmp_path / "none.sock") as client:
        client.status()


# -- ARP

REQUEST = bytes.fromhex(
    "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 0a000001 000000000000 0a000002".replace(" ", "")
)
"""h1 (10.0.0.1) asks who has 10.0.0.2; written out by RFC 826."""
REPLY = bytes.fromhex(
    "020000000001 020000000002 0806 0001 0800 06 04 0002 020000000002 0a000002 020000000001 0a000001".replace(" ", "")
)


def test_arp_is_answered_as_rfc_826_says() -> None:
    request = ArpFrame.parse(REQUEST)
    assert request is not None and request.is_request
    assert reply_to(request, "02:00:00:00:00:02") == REPLY.ljust(60, b"\0")


def test_one_who_asks_for_himself_gets_no_answer() -> None:
    """Duplicate address detection: an answer would be a conflict."""
    request = ArpFrame.parse(REQUEST)
    assert request is not None
    assert reply_to(request, "02:00:00:00:00:01") is None


@pytest.mark.parametrize("frame", [b"", REQUEST[:41], REQUEST.replace(b"\x08\x06", b"\x86\xdd"), bytes(60)])
def test_what_is_not_arp_is_not_arp(frame: bytes) -> None:
    assert ArpFrame.parse(frame) is None


def test_a_reply_is_no_request() -> None:
    frame = ArpFrame.parse(REPLY)
    assert frame is not None and not frame.is_request


# -- the flow cache

DUMP = """flow-dump from the main thread:
recirc_id(0),in_port(m1-s1p1),packet_type(ns=0,id=0),eth(dst=02:00:00:00:00:02),eth_type(0x0800),\
ipv4(dst=10.0.0.2,frag=no), packets:9, bytes:882, used:0.001s, actions:set(eth(dst=02:00:00:00:00:03)),m1-s1p3
recirc_id(0),in_port(m1-s2p1),packet_type(ns=0,id=0),eth_type(0x0800),ipv4(dst=10.0.0.2,frag=no), packets:0, bytes:0, \
used:never, actions:m1-s2p2
recirc_id(0),in_port(m1-s1p3),packet_type(ns=0,id=0),eth_type(0x0806), packets:1, bytes:42, used:0.5s, \
actions:userspace(pid=0,controller(reason=1,dont_send=0,continuation=0,recirc_id=18,rule_cookie=0x6d,controller_id=0))
recirc_id(0),in_port(m1-s3p3),eth_type(0x0800),ipv4(dst=10.0.0.2,frag=no), packets:1, bytes:42, used:0.5s, actions:drop
"""


def test_outputs_of_cached_flows_are_read() -> None:
    """Captured from Open vSwitch 3.1.0, interface names shortened."""
    assert datapath.outputs(DUMP) == {"m1-s1p3", "m1-s2p2"}
    assert datapath.outputs("flow-dump from the main thread:\n") == set()


def test_the_flow_cache_is_asked_and_errors_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "vswitchd.ctl"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    asked: list[dict[str, Any]] = []

    def serve() -> None:
        connection, _ = listener.accept()
        for answer in ({"id": 0, "result": DUMP, "error": None}, {"id": 0, "result": None, "error": "no datapath"}):
            asked.append(json.loads(connection.recv(4096)))
            text = json.dumps(answer).encode()
            connection.sendall(text[:50])
            connection.sendall(text[50:])
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    cache = datapath.FlowCache(path, "netdev@ovs-netdev")
    assert cache.outputs("10.0.0.2") == {"m1-s1p3", "m1-s2p2"}
    assert asked[0]["method"] == "dpctl/dump-flows"
    assert asked[0]["params"] == ["--names", "netdev@ovs-netdev", "filter=ip,nw_dst=10.0.0.2"]
    with pytest.raises(datapath.FlowCacheError, match="no datapath"):
        cache.outputs("10.0.0.2")
    with pytest.raises(datapath.FlowCacheError, match=r"closed|pipe|reset"):
        cache.outputs("10.0.0.2")


def test_without_ovs_there_is_no_flow_cache(tmp_path: Path) -> None:
    with pytest.raises(datapath.FlowCacheError, match="is not running"):
        datapath.control_socket(tmp_path)


# -- neighbour discovery

ASKED = IPv6(src="fd00::1", dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt="fd00::2")
QUESTION = bytes(
    Ether(src="02:00:00:00:00:01", dst="33:33:ff:00:00:02") / ASKED / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:01")
)


def test_a_solicitation_is_answered_as_rfc_4861_says() -> None:
    question = Solicitation.parse(QUESTION)
    assert question is not None and (question.sender_ip, question.target_ip) == ("fd00::1", "fd00::2")
    answer = advertise(question, "02:00:00:00:00:02")
    assert answer is not None
    expected = (
        Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")
        / IPv6(src="fd00::2", dst="fd00::1", hlim=255)
        / ICMPv6ND_NA(tgt="fd00::2", R=0, S=1, O=1)
        / ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:00:02")
    )
    assert answer == bytes(expected)
    assert advertise(question, "02:00:00:00:00:01") is None, "one who asks for an address of its own"


def test_what_is_no_solicitation_is_none() -> None:
    """Detection of duplicate addresses, another hop limit, another message, cut short, ARP."""
    free = Ether(src="02:00:00:00:00:01") / IPv6(src="::", dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt="fd00::2")
    routed, other = bytearray(QUESTION), bytearray(QUESTION)
    routed[21], other[54] = 64, 136
    for frame in (bytes(free), bytes(routed), bytes(other), QUESTION[:77], REQUEST, b""):
        assert Solicitation.parse(frame) is None
