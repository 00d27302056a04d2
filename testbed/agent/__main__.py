"""`python -m testbed.agent --host NAME --root DIR --interface IF`: started on a host by the testbed, over SSH."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from testbed.agent.channel import Channel
from testbed.agent.service import Agent
from testbed.agent.table import OPS


def main() -> None:
    """Serve the channel on the standard streams until it closes, then end the process."""
    parser = argparse.ArgumentParser(prog="python -m testbed.agent", description=__doc__)
    parser.add_argument("--host", required=True, help="name of this host in the topology")
    parser.add_argument("--root", type=Path, default=Path("/run/migros"), help="private folder of this host")
    parser.add_argument("--interface", required=True, help="the data interface")
    options = parser.parse_args()

    # The channel gets descriptors of its own, so that nothing a child or a library prints can get into it.
    read_fd, write_fd = (os.dup(fd) for fd in (0, 1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)

    agent = Agent(options.host, Channel(read_fd, write_fd), options.root, options.interface)

    def terminate(_number: int, _frame: object) -> None:
        agent.end_everything()
        os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the testbed handles Ctrl-C and closes the channel
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    agent.serve(OPS)
    sys.stderr.flush()
    os._exit(0)  # threads that are still blocked in operations must not delay the end


if __name__ == "__main__":
    main()
