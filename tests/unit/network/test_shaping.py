"""The words that tc gets, the NIC's share of an impairment, sshd's configuration, the choice of tag and slot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.base.errors import EnvironmentProblem
from testbed.cleanup.state import RunState
from testbed.network import fixtures, machine, shaping, ssh


def value(words: list[str], key: str) -> int:
    return int(words[words.index(key) + 1].removesuffix("kbit"))


@given(st.floats(1, 400_000), st.integers(1280, 9216))
def test_a_bucket_holds_what_its_rate_needs(bw: float, mtu: int) -> None:
    """Invariants: the rate is what was asked for; several whole frames fit the bucket; a millisecond of the rate, which
    is how long a coarse timer may sleep, fits bucket and queue together."""
    words = shaping.token_bucket(bw, mtu)
    assert value(words, "rate") == round(bw * 1000)
    assert value(words, "burst") >= 4 * mtu
    assert value(words, "limit") - value(words, "burst") >= 16 * mtu
    assert value(words, "limit") >= bw * 1e6 / 8 * 0.001


@pytest.mark.parametrize("bw", [0, -1, 1e9])
def test_an_impossible_rate_is_refused(bw: float) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        shaping.token_bucket(bw, 9000)


def test_netem_in_its_own_units() -> None:
    assert shaping.netem(0.0015, 0.01) == ["netem", "limit", "100000", "delay", "1500us", "loss", "1.000000%"]
    assert shaping.netem(0, 0.5) == ["netem", "limit", "100000", "loss", "50.000000%"]


class FakeTc:
    """Answers like tc on a kernel that has the disciplines in `known`, and remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *known: str) -> None:
        self.known = known
        self.asked: list[str] = []
        self.rate = 0
        monkeypatch.setattr(shaping, "command", self)

    def __call__(self, *argv: str, pid: int | None = None) -> str:
        if "show" in argv:
            return json.dumps([{"kind": "tbf", "options": {"rate": self.rate}}] if self.rate else [])
        words = list(argv)
        kind = next(word for word in words if word in ("tbf", "netem"))
        if kind not in self.known:
            raise machine.CommandFailed(argv, f'Error: Specified qdisc kind is unknown: "{kind}".')
        if kind == "tbf":
            self.rate = value(words, "rate") * 125
        self.asked.append(" ".join(words))
        return ""


def test_bandwidth_delay_and_loss_stand_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tc = FakeTc(monkeypatch, "tbf", "netem")
    assert shaping.shape("x", 2500, 9000, 0.001, 0.0) is True
    bucket, delay = tc.asked
    assert bucket.startswith("tc qdisc replace dev x root handle 1: tbf rate 2500000kbit ")
    assert delay == "tc qdisc replace dev x parent 1:1 handle 10: netem limit 100000 delay 1000us"
    assert shaping.shape("y", None, 9000, 0.0, 0.25) is True
    assert tc.asked[-1] == "tc qdisc replace dev y root handle 10: netem limit 100000 loss 25.000000%"


def test_without_netem_it_says_so_and_keeps_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    tc = FakeTc(monkeypatch, "tbf")
    assert shaping.shape("x", 100, 9000, 0.001, 0.0) is False
    assert len(tc.asked) == 1


def test_a_bandwidth_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTc(monkeypatch)
    with pytest.raises(EnvironmentProblem, match="cannot limit it to 100 Mbit/s"):
        shaping.shape("x", 100, 9000, 0.0, 0.0)


def test_a_kernel_that_took_another_rate_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTc(monkeypatch, "tbf")
    monkeypatch.setattr(shaping, "token_bucket", lambda bw, mtu: ["tbf", "rate", "1000kbit"])
    with pytest.raises(EnvironmentProblem, match="asked for 100 Mbit/s"):
        shaping.shape("x", 100, 9000, 0.0, 0.0)


def test_impairments_add_up() -> None:
    """Delays in a row add; of what survives the cable, the NIC loses its share."""
    assert shaping.combined({}, 0.001, 0.01) == {"delay": 0.001, "loss": 0.01}
    assert shaping.combined({"loss": 0.5, "reorder": 0.1}, 0, 0.5) == {"loss": 0.75, "reorder": 0.1}
    assert shaping.combined({"delay": 0.001}, 0.002, 0) == {"delay": pytest.approx(0.003)}


def test_sshd_admits_the_run_s_key_only(tmp_path: Path) -> None:
    text = ssh.configuration(tmp_path, "100.65.0.1", "run-1")
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    assert lines["ListenAddress"] == "100.65.0.1:22"
    assert lines["AuthenticationMethods"] == "publickey"
    assert lines["AuthorizedKeysFile"] == f"{tmp_path}/authorized_keys"
    assert lines["SetEnv"] == "MIGROS_TESTBED_RUN=run-1"
    assert "~" not in text and "/root" not in text


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIGROS_TESTBED_RUN", "")  # put back afterwards: RunState.create changes it
    points = tuple(str(tmp_path / name) for name in ("migros", "sshd"))
    monkeypatch.setattr(fixtures, "MOUNT_POINTS", points)
    return tmp_path / "runs"


def test_runs_at_the_same_time_get_different_tags_and_slots(base: Path) -> None:
    claims = [fixtures.claim(RunState.create(f"run{k}", base)) for k in range(5)]
    assert len({tag for tag, _ in claims}) == 5
    assert len({slot for _, slot in claims}) == 5
    assert all(len(tag) == 5 for tag, _ in claims)


def test_the_last_run_takes_the_mount_points_away(base: Path, tmp_path: Path) -> None:
    """Not while another run is there, and not what was there before."""
    (tmp_path / "sshd").mkdir()
    first, second = RunState.create("one", base), RunState.create("two", base)
    fixtures.claim(first)
    fixtures.claim(second)
    assert (tmp_path / "migros").is_dir()
    first.close()
    fixtures.clean(base)
    assert (tmp_path / "migros").is_dir()
    second.close()
    fixtures.clean(base)
    assert not (tmp_path / "migros").exists()
    assert (tmp_path / "sshd").is_dir()


class FakeKernel:
    """One setting, as the kernel would keep it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value = "212992"
        monkeypatch.setattr(machine, "read_sysctl", lambda _: self.value)
        monkeypatch.setattr(machine, "write_sysctl", self._write)

    def _write(self, name: str, value: str) -> None:
        assert name == "net.core.rmem_default"
        self.value = value


def test_receive_buffers_are_wide_only_meanwhile(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch)
    base.mkdir()
    with pytest.raises(RuntimeError, match="half way"), fixtures.wide_receive_buffers(base) as size:
        assert int(kernel.value) == size == fixtures.SOCKET_MEMORY
        raise RuntimeError("half way")
    assert kernel.value == "212992"
    assert list(base.iterdir()) == []


def test_what_a_killed_run_left_of_them_is_restored(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value in the file counts, not the one that the next run finds."""
    kernel = FakeKernel(monkeypatch)
    base.mkdir()
    (base / "rmem_default").write_text("212992")
    kernel.value = str(fixtures.SOCKET_MEMORY)
    fixtures.clean(base)
    assert kernel.value == "212992"


def test_a_failing_command_says_which_and_why() -> None:
    with pytest.raises(machine.CommandFailed, match=r"`sh -c echo broken >&2; exit 3` failed: broken"):
        machine.command("sh", "-c", "echo broken >&2; exit 3")


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.NEEDED, "no-such-program", "some-package")
    with pytest.raises(machine.CommandFailed) as caught:
        machine.command("no-such-program")
    assert caught.value.hint == "apt install some-package"
