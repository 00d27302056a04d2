"""What perftest 4.5, iperf3 3.12 and iputils' ping print, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest

from testbed.measure.numbers import Unreadable, bandwidth, iperf3, latency, ping

WRITE_BW = """
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : rxe0
 local address: LID 0000 QPN 0x0011 PSN 0x53b05d RKey 0x0001ae VAddr 0x007f4a3a4ba000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:00:00:01
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 1048576    317              0.00               2.66   \t\t   0.000317
 2097152    100              0.00               2.71   \t\t   0.000161
---------------------------------------------------------------------------------------
"""

SEND_LAT = """
---------------------------------------------------------------------------------------
                    Send Latency Test
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 64      1000          41.10          3120.77      52.31              60.12            12.00         180.00                 3120.77
---------------------------------------------------------------------------------------
"""  # noqa: E501

SEND_LAT_DURATION = """
 #bytes        #iterations       t_avg[usec]    tps average
 64            20000             55.25          18099.50
---------------------------------------------------------------------------------------
"""

FAILED = "Port number 1 state is Down\n Couldn't set the link layer\n Couldn't get context for the device\n"


def test_bandwidth() -> None:
    assert bandwidth(["ib_write_bw"], WRITE_BW) == 2.71, "the last row"


def test_megabytes_are_not_taken_for_gigabits() -> None:
    with pytest.raises(Unreadable):
        bandwidth(["ib_write_bw"], WRITE_BW.replace("Gb/sec", "MB/sec"))


def test_latency() -> None:
    assert latency(["ib_send_lat"], SEND_LAT) == 52.31
    assert latency(["ib_send_lat", "-D", "5"], SEND_LAT_DURATION) == 55.25


READERS = [partial(bandwidth, ["ib_write_bw"]), partial(latency, ["ib_send_lat"]), iperf3, ping]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("output", ["", FAILED, "{}", " #bytes     #iterations\n"])
def test_failures_are_shown_with_the_programs_last_words(reader: Callable[[str], object], output: str) -> None:
    with pytest.raises(Unreadable) as caught:
        reader(output)
    if output == FAILED:
        assert "Couldn't get context for the device" in str(caught.value)


def test_iperf3() -> None:
    assert iperf3(json.dumps({"end": {"sum_received": {"bits_per_second": 6.5e9}}})) == 6.5


def test_ping() -> None:
    line = "64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time={} ms\n"
    assert ping("PING 10.0.0.2\n" + line.format("0.047") + line.format("0.1")) == [47.0, 100.0]
