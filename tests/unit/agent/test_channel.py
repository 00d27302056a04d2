"""Invariant: whatever the cuts in the byte stream, the same objects come out, in order, each once."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.agent.channel import MAX_LINE, Channel, ChannelClosed, LineReader, encode

objects = st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), max_size=8)


@given(objects, st.lists(st.integers(1, 30), min_size=1))
def test_any_cut_gives_the_same_objects(messages: list[dict[str, object]], cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in messages)
    reader, found, position, turn = LineReader(), [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        found += list(reader.feed(stream[position : position + size]))
        position, turn = position + size, turn + 1
    assert found == messages


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"3\n"])
def test_what_is_no_object_closes_the_channel(line: bytes) -> None:
    with pytest.raises(ChannelClosed, match="not a JSON"):
        list(LineReader().feed(line))


def test_endless_line_closes_the_channel() -> None:
    reader = LineReader()
    with pytest.raises(ChannelClosed, match="a line of more than"):
        for _ in range(3):
            list(reader.feed(b"x" * (MAX_LINE // 2)))


def test_lines_of_many_threads_stay_whole() -> None:
    read_fd, write_fd = os.pipe()
    channel = Channel(read_fd, write_fd)
    threads = [
        threading.Thread(target=lambda n=n: [channel.send({"n": n, "i": i, "pad": "x" * 5000}) for i in range(50)])
        for n in range(4)
    ]
    found: dict[int, list[int]] = {n: [] for n in range(4)}

    def receive() -> None:
        for message in channel.messages():
            found[message["n"]].append(message["i"])

    receiver = threading.Thread(target=receive)
    receiver.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(write_fd)
    receiver.join(10)
    assert found == {n: list(range(50)) for n in range(4)}


def test_send_without_a_reader_raises() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with pytest.raises(ChannelClosed):
        Channel(read_fd, write_fd).send({"a": 1})
