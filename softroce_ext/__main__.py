"""`python -m softroce_ext`: start a NIC on an interface of this network namespace.

Prints the line `ready` when programs can open the device; ends on SIGTERM or SIGINT and removes its files.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import os
import resource
import signal
import struct
import sys
from pathlib import Path

from softroce_ext.device.numbers import MAX_BASE
from softroce_ext.native import build
from softroce_ext.port.impairment import ImpairmentSpec

EXIT_ENVIRONMENT = 3
HIGH_NICE = -15
SLICE_NS = 100_000
_SYS_SCHED_SETATTR = 314 if os.uname().machine == "x86_64" else 274


def _address(text: str) -> bytes:
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _impairment(text: str) -> ImpairmentSpec:
    try:
        return ImpairmentSpec.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _base(text: str) -> int:
    if not text.isdigit() or int(text) > MAX_BASE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MAX_BASE}")
    return int(text)


def _mtu(text: str) -> int:
    if not text.isdigit() or not 336 <= int(text) <= 9200:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interface MTU from 336 to 9200 bytes")
    return int(text)


def _priority(level: str) -> None:
    """Let the NIC run before the programs that poll on the same processors, as hardware would."""
    if level == "realtime":
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            return
        except OSError:  # many containers: the next best
            level = "high"
    try:
        if level == "high":
            os.setpriority(os.PRIO_PROCESS, 0, HIGH_NICE)
            _short_slice()
    except OSError:
        print(f"softroce_ext: priority {level!r} is not allowed here; latencies will be longer", file=sys.stderr)


def _short_slice() -> None:
    """Ask for the shortest time slice (Linux 6.12 and later): processes with a longer one are interrupted."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct sched_attr: size, policy, flags, nice, priority, runtime (ns; the slice of SCHED_OTHER), deadline, period
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, HIGH_NICE, 0, SLICE_NS, 0, 0)
    libc.syscall(_SYS_SCHED_SETATTR, 0, attributes, 0)


def _limits() -> None:
    """Raise the limit on descriptors (each opening takes several), and survive programs that truncate their queues."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        if ctypes.CDLL(str(build.path("guard"))).guard_install():
            raise OSError("sigaction failed")
    except (OSError, build.BuildError) as error:
        print(f"softroce_ext: without protection against truncated queues: {error}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m softroce_ext", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--interface", required=True, help="network interface that carries the RoCEv2 frames")
    p.add_argument("--address", action="append", type=_address, default=[], metavar="IP", help="a GID; may be repeated")
    p.add_argument(
        "--follow", action="store_true", help="GIDs are the interface's addresses (so without --address too)"
    )
    p.add_argument(
        "--run-dir", type=Path, default=Path("/run/migros/nic"), help="directory of sockets and device files"
    )
    p.add_argument(
        "--number-base", type=_base, default=0, help=f"range of QPNs and keys, 0..{MAX_BASE}, one for each NIC"
    )
    p.add_argument("--mtu", type=_mtu, help="lower the interface MTU that the active RDMA MTU is computed from")
    p.add_argument("--no-migros", action="store_true", help="plain RoCEv2, byte for byte as Linux rxe")
    p.add_argument("--capture", metavar="FILE", help="write a pcap of all frames from the start")
    p.add_argument("--snaplen", type=int, default=65535, help="bytes of each frame in the pcap")
    p.add_argument("--seed", type=int, default=0, help="of the impairment")
    p.add_argument(
        "--impair", type=_impairment, default=ImpairmentSpec(), metavar="NAME=VALUE,…",
        help="loss, duplicate, reorder, corrupt (probabilities), delay (seconds) of the frames sent",
    )  # fmt: skip
    p.add_argument("--spin", type=float, default=0.0, metavar="MICROSECONDS", help="stay awake this long after work")
    p.add_argument("--priority", choices=("realtime", "high", "normal"), default="realtime")
    p.add_argument("--trace", metavar="FILE", help="write one line for each command of a program")
    p.add_argument("--trace-qp", metavar="FILE", help="trace every queue pair, JSON lines")
    p.add_argument("--profile", metavar="FILE", help="write a cProfile of the loop at the end")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run a NIC until it is stopped; returns the exit code."""
    options = parser().parse_args(argv)
    from softroce_ext.process.nic import Nic, NicConfig

    config = NicConfig(
        interface=options.interface,
        addresses=options.address,
        run_directory=options.run_dir.absolute(),
        number_base=options.number_base,
        mtu=options.mtu,
        migros=not options.no_migros,
        capture=options.capture,
        snaplen=options.snaplen,
        seed=options.seed,
        impairment=options.impair,
        spin=options.spin * 1e-6,
        trace=options.trace,
        trace_qp=options.trace_qp,
        follow=options.follow or not options.address,
    )
    try:
        nic = Nic(config)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"softroce_ext: cannot start on {options.interface}: {error.strerror}{where}", file=sys.stderr)
        print(
            "  hint: run as root inside the host's network namespace; `ip link` lists the interfaces", file=sys.stderr
        )
        return EXIT_ENVIRONMENT
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: nic.stop())
    # A signal must end a sleep in epoll: the handler only sets a flag; the byte in this pipe wakes the loop.
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing)
    nic.descriptors.watch(reading, lambda _: None)
    _priority(options.priority)
    _limits()
    print("ready", flush=True)
    try:
        if options.profile:
            import cProfile

            profile = cProfile.Profile()
            try:
                profile.runcall(nic.run)
            finally:
                profile.dump_stats(options.profile)
        else:
            nic.run()
    finally:
        nic.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
