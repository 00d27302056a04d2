"""The controller's process: `python -m testbed.controller --fabric FILE --socket PATH [--framework auto|ryu|os-ken]`.

It listens for switches on 127.0.0.1 at a port that the kernel chooses, prints the line `ready {"openflow_port": …}` to
standard output when both sockets are listening, and logs to standard error. SIGTERM ends it; switches keep their flows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Final

from testbed.base.errors import TestbedError
from testbed.controller import framework
from testbed.controller.datapath import FlowCache
from testbed.controller.fabric import Fabric

PRIORITY: Final = -10
"""Nice value of the process, the same as that of ovs-vswitchd."""


def main() -> int:
    """Run until killed. The exit code is 3 if no framework is installed and 2 for a bad fabric file."""
    options = argparse.ArgumentParser(prog="testbed.controller", description="OpenFlow controller of one run")
    options.add_argument("--fabric", type=Path, required=True, help="JSON file, see testbed.controller.fabric")
    options.add_argument("--socket", type=Path, required=True, help="path of the northbound Unix socket to create")
    options.add_argument("--ovs-control", type=Path, help="ovs-vswitchd's control socket, to read its flow cache")
    options.add_argument("--datapath", help="name of the datapath, for example netdev@ovs-netdev")
    options.add_argument(
        "--framework",
        choices=("auto", *framework.PACKAGES),
        default="auto",
        help="OpenFlow framework (default: %(default)s)",
    )
    arguments = options.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        fw = framework.load(framework.choose(arguments.framework))
        fabric = Fabric.from_plain(json.loads(arguments.fabric.read_text()))
    except TestbedError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    except (OSError, ValueError) as error:
        print(f"{arguments.fabric}: {error}", file=sys.stderr)
        return 2
    # A move happens while programs are frozen and others poll on every core; an idle controller costs nothing.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    run(fw, fabric, arguments)
    return 0


def run(fw: Any, fabric: Fabric, arguments: argparse.Namespace) -> None:
    """Start the framework with our application; returns when the framework ends."""
    # Imported here because importing them uses modules that the framework has just patched.
    from testbed.controller import application, northbound

    class LoopbackController(fw.controller.OpenFlowController):  # type: ignore[misc]
        """A controller that lets the kernel choose a free port, whereas the frameworks need one given in advance."""

        def server_loop(self, *_: Any) -> None:
            """Listen, print the `ready` line, and serve switches."""
            server = fw.hub.StreamServer(("127.0.0.1", 0), fw.controller.datapath_connection_factory)
            port = server.server.getsockname()[1]
            print("ready", json.dumps({"openflow_port": port}), flush=True)
            server.serve_forever()

    fw.ofp_handler.OpenFlowController = LoopbackController
    fw.cfg.CONF(args=[], project="testbed", default_config_files=[])
    # Any number will do: it only keeps the framework from also listening at its two well-known ports.
    fw.cfg.CONF.set_override("ofp_tcp_listen_port", 1)
    application.Reroute.fabric = fabric
    application.Reroute.listener = northbound.listen(arguments.socket)
    if arguments.ovs_control and arguments.datapath:
        application.Reroute.flow_cache = FlowCache(arguments.ovs_control, arguments.datapath)
    fw.app_manager.AppManager.run_apps([application.__name__])


if __name__ == "__main__":
    sys.exit(main())
