"""The agent's end of CRIU's hooks, with the real action script and a stand-in for CRIU that runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from testbed.checkpoint import criu_log
from testbed.checkpoint.hooks import CriuFailed, Hooks, action_script, plugin_directory


def stage(hooks: Hooks, name: str, waits_at: str = "post-dump,post-restore") -> subprocess.Popen[bytes]:
    """Run the action script as CRIU does at one of its stages."""
    environment = {**os.environ, **hooks.environment(*waits_at.split(",")), "CRTOOLS_SCRIPT_ACTION": name}
    return subprocess.Popen([action_script()], env={**environment, "CRTOOLS_INIT_PID": "77"}, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(("go", "status"), [(True, 0), (False, 1)])
def test_the_script_s_exit_status_is_the_answer(tmp_path: Path, go: bool, status: int) -> None:
    hooks = Hooks(tmp_path / "s")
    script = stage(hooks, "post-dump")
    call = hooks.wait("post-dump", script, 10)
    assert (call.name, call.pid) == ("post-dump", 77)
    assert script.poll() is None, "it waits for the answer"
    call.answer(go)
    assert script.wait(10) == status
    hooks.close()


def test_an_agent_that_ends_says_no(tmp_path: Path) -> None:
    hooks = Hooks(tmp_path / "s")
    script = stage(hooks, "post-dump")
    hooks.wait("post-dump", script, 10)
    hooks.close()
    assert script.wait(10) == 1
    assert stage(hooks, "post-dump").wait(10) == 1, "there is no listener any more"


def test_other_stages_do_not_wait(tmp_path: Path) -> None:
    hooks = Hooks(tmp_path / "s")
    for name in ("pre-dump", "network-lock", "post-dum", "post-dump-2", ""):
        assert stage(hooks, name).wait(10) == 0
    hooks.close()


def test_a_criu_that_ends_early_and_one_that_never_calls(tmp_path: Path) -> None:
    hooks = Hooks(tmp_path / "s")
    with pytest.raises(CriuFailed, match="ended with code 3 before 'post-dump'"):
        hooks.wait("post-dump", subprocess.Popen(["sh", "-c", "exit 3"]), 10)
    sleeper = subprocess.Popen(["sleep", "60"])
    with pytest.raises(CriuFailed, match=r"did not reach 'post-dump' within 0\.1 s"):
        hooks.wait("post-dump", sleeper, 0.1)
    sleeper.kill()
    sleeper.wait()
    hooks.close()


def test_the_plugin_is_alone_in_its_folder() -> None:
    """CRIU loads every library of the folder."""
    assert [path.name for path in Path(plugin_directory()).glob("*.so")] == ["criu_hook.so"]


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(CriuFailed, match="longer than 107 bytes"):
        Hooks(tmp_path / ("x" * 120))


def test_the_reason_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "restore.log"
    assert criu_log.summary(criu_log.errors(log), "nothing") == "nothing"
    log.write_text(
        "(00.0) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "(00.1) Error (criu/files-reg.c:2100): File run/migros/x has bad size 3 (expect 4)\n"
        "(00.2) Error (criu/cr-restore.c:2300): Restoring FAILED.\n"
    )
    assert criu_log.summary(criu_log.errors(log), "nothing") == "File run/migros/x has bad size 3 (expect 4)"
