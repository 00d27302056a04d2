"""Ryu or os-ken under one set of names, and the adjustments that Ryu 4.34 needs on a current Python.

os-ken is Ryu's maintained fork with the same API under another package name. `load(kind)` imports one of them, and must
be called before anything in the process uses sockets or threads: Ryu is based on eventlet, which patches them.
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
"""Name for users and pip → importable package, in order of preference."""

_loaded: SimpleNamespace | None = None


def choose(kind: str = "auto") -> str:
    """The framework to use, `ryu` or `os-ken`: `kind`, or the first that is installed. Raises EnvironmentProblem."""
    wanted = list(PACKAGES) if kind == "auto" else [kind]
    for name in wanted:
        if importlib.util.find_spec(PACKAGES[name]) is not None and (name != "ryu" or sys.version_info < (3, 12)):
            return name
    raise EnvironmentProblem(
        f"no usable OpenFlow controller; looked for: {', '.join(wanted)}",
        hint="./bootstrap installs Ryu (Python < 3.12) or os-ken; by hand: pip install os-ken",
    )


def version(kind: str) -> str:
    """Name and version of an installed framework for the report, such as `ryu 4.34`."""
    return f"{kind} {importlib.metadata.version(kind)}"


def load(kind: str) -> SimpleNamespace:
    """Import the framework and return its modules by name. A process can load only one, and only once."""
    global _loaded
    if _loaded is None:
        if kind == "ryu":
            _prepare_ryu()
        package = PACKAGES[kind]

        def module(name: str) -> ModuleType:
            return importlib.import_module(f"{package}.{name}")

        # Patching comes first, and in two steps because eventlet takes `thread=True` alone to mean "only threads".
        # os-ken's native hub does nothing here.
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
    """The result of `load`. Raises RuntimeError if it has not been called: the application was imported too early."""
    if _loaded is None:
        raise RuntimeError("call load(kind) first: the framework patches sockets and threads")
    return _loaded


def _prepare_ryu() -> None:
    """Adapt eventlet to Ryu 4.34, which dates from 2020."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    # eventlet imports pyOpenSSL if it is installed, for TLS, which is not used here. A distribution's old pyOpenSSL and
    # a new cryptography fail at import with AttributeError, which eventlet does not expect, so pyOpenSSL is hidden.
    sys.modules.setdefault("OpenSSL", None)  # type: ignore[arg-type]
    wsgi = importlib.import_module("eventlet.wsgi")
    # Ryu's web server module imports this name, which eventlet 0.30.3 removed; any unique object will do.
    if not hasattr(wsgi, "ALREADY_HANDLED"):
        wsgi.ALREADY_HANDLED = object()  # type: ignore[attr-defined]
