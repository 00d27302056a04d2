"""Ryu or os-ken under one set of names, and what Ryu 4.34 needs to run on a present-day Python.

os-ken is Ryu's maintained fork with the same API under another package name. `load(kind)` imports one of them and must
be called before anything else in the process that uses sockets or threads: Ryu lives on eventlet, which patches them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from testbed.base.errors import EnvironmentProblem

PACKAGES: Final = {"ryu": "ryu", "os-ken": "os_ken"}
"""Name that users know (and pip) → importable package, in order of preference."""

_loaded: SimpleNamespace | None = None


def choose(kind: str = "auto") -> str:
    """`ryu` or `os-ken`: the one asked for, or the first that is installed. Raises EnvironmentProblem."""
    wanted = list(PACKAGES) if kind == "auto" else [kind]
    for name in wanted:
        if importlib.util.find_spec(PACKAGES[name]) is not None and (name != "ryu" or sys.version_info < (3, 12)):
            return name
    raise EnvironmentProblem(
        f"no OpenFlow controller: {' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} not installed",
        hint="./bootstrap installs Ryu (Python < 3.12) or os-ken; by hand: pip install os-ken",
    )


def version(kind: str) -> str:
    """For the report: `ryu 4.34`."""
    return f"{kind} {importlib.metadata.version(kind)}"


def load(kind: str) -> SimpleNamespace:
    """Import the framework; gives its modules by their names. The same process can load only one, once."""
    global _loaded
    if _loaded is None:
        if kind == "ryu":
            _prepare_ryu()
        package = PACKAGES[kind]

        def module(name: str) -> ModuleType:
            return importlib.import_module(f"{package}.{name}")

        # Patching comes first, in two steps: eventlet reads a lone `thread=True` as "threads only". os-ken's native hub
        # does nothing here.
        hub = module("lib.hub")
        hub.patch(thread=False)
        hub.patch(thread=True)
        app_manager = module("base.app_manager")
        _loaded = SimpleNamespace(
            kind=kind,
            hub=hub,
            app_manager=app_manager,
            App=app_manager.RyuApp if kind == "ryu" else app_manager.OSKenApp,
            cfg=module("cfg"),
            controller=module("controller.controller"),
            ofp_event=module("controller.ofp_event"),
            ofp_handler=module("controller.ofp_handler"),
            handler=module("controller.handler"),
            ofproto=module("ofproto.ofproto_v1_3"),
            parser=module("ofproto.ofproto_v1_3_parser"),
        )
    return _loaded


def loaded() -> Any:
    """What `load` gave. Raises RuntimeError if it has not been called: the application was imported too early."""
    if _loaded is None:
        raise RuntimeError("load(kind) comes first: the framework patches sockets and threads")
    return _loaded


def _prepare_ryu() -> None:
    """Ryu 4.34 is of 2020; eventlet has gone on since."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    # eventlet takes pyOpenSSL where it is there, for TLS that nobody uses here. A distribution's old pyOpenSSL beside a
    # new cryptography fails at import with AttributeError, which eventlet does not expect: let it not be found at all.
    sys.modules.setdefault("OpenSSL", None)  # type: ignore[arg-type]
    wsgi = importlib.import_module("eventlet.wsgi")
    # Ryu's web server module imports this name, which eventlet 0.30.3 removed; the object's identity is all it needs.
    if not hasattr(wsgi, "ALREADY_HANDLED"):
        wsgi.ALREADY_HANDLED = object()  # type: ignore[attr-defined]
