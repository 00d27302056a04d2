"""`python -m testbed`: the command line. Errors are printed as message and hint; their type gives the exit code."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from testbed.base.errors import Exit, TestbedError


def _use_own_environment() -> None:
    """Restart in the checkout's virtual environment if this Python lacks our dependencies.

    `sudo python3 -m testbed` loses the active environment, because sudo resets PATH. The environment that `./bootstrap`
    creates is next to the package, so it can be found automatically.
    """
    if find_spec("typer") is not None and find_spec("pydantic") is not None:
        return
    root = Path(__file__).resolve().parent.parent
    python = root / ".venv/bin/python"
    if python.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        os.execv(python, [str(python), "-m", "testbed", *sys.argv[1:]])
    print(f"testbed: this Python ({sys.executable}) lacks the testbed's dependencies", file=sys.stderr)
    if (root / "bootstrap").is_file():
        print("  hint: ./bootstrap installs them into .venv", file=sys.stderr)
    else:
        print("  hint: install the testbed's wheel with pip, without --no-deps", file=sys.stderr)
    sys.exit(Exit.ENVIRONMENT)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    # SIGTERM and SIGHUP end a run in the same way as Ctrl-C: everything is removed first.
    raise KeyboardInterrupt


def main() -> None:
    """Run one verb and exit with its code (`testbed.base.errors.Exit`)."""
    _use_own_environment()
    from testbed.cli.main import app

    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        code = app()
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has exited (`testbed schema | head`); Python would report that again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
    sys.exit(code)


if __name__ == "__main__":
    main()
