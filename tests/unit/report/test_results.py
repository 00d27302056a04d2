"""Run folders, statistics and the summary's schema.

Invariants: a summary survives the way to disk and back; the published schema is the models'; an event that is not in
the table is refused; an interval holds its median, is the same for the same seed and narrows with more samples.
"""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.record.folder import RunFolder, load_summary, summarise_repeats
from testbed.record.stats import estimate, over_runs, paired_ratio, significant
from testbed.record.summary import PHASES, SCHEMA_FILE, Environment, Migration, Summary, summary_schema
from testbed.run.captures import count_frames, found

FIXTURE = Path(__file__).parent / "migrated.json"


def make_summary(folder: RunFolder, *, blackout: float = 400.0, ok: bool = True, code: int = 0) -> Summary:
    migration = Migration(
        index=0, app="server", from_host="h2", to_host="h3", ok=ok, rolled_back=not ok, blackout_ms=blackout,
        phases_ms={"freeze": blackout / 2}, app_exit_code=code, error=None if ok else "restore failed",
    )  # fmt: skip
    return Summary(
        ok=ok, topology="t", run_id=folder.run_id, started=folder.started_utc, duration_s=1.5, seed=folder.seed,
        migrations=[migration], folder=str(folder.path),
    )  # fmt: skip


class TestFolder:
    def test_layout_and_round_trip(self, tmp_path: Path) -> None:
        with RunFolder.create("migrate_pair", seed=7, root=tmp_path) as folder:
            assert folder.path.parent == tmp_path / "migrate_pair"
            folder.write_topology({"name": "migrate_pair", "hosts": {"h1": {"ip": "10.0.0.1"}}})
            folder.write_environment(Environment(kernel="6.1"))
            folder.event("note", text="hello")
            summary = make_summary(folder)
            folder.finish(summary)
        assert load_summary(folder.path) == summary
        assert yaml.safe_load((folder.path / "topology.yaml").read_text())["hosts"] == {"h1": {"ip": "10.0.0.1"}}
        assert json.loads((folder.path / "versions.json").read_text())["kernel"] == "6.1"
        (event,) = (json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines())
        assert event["event"] == "note" and event["text"] == "hello" and 0 <= event["t"] < 60

    def test_two_runs_in_one_second_do_not_share_a_folder(self, tmp_path: Path) -> None:
        assert len({RunFolder.create("t", seed=1, root=tmp_path).path for _ in range(20)}) == 20

    @pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "x y"])
    def test_a_topology_name_cannot_leave_the_results(self, tmp_path: Path, name: str) -> None:
        folder = RunFolder.create(name, seed=1, root=tmp_path / "results")
        assert folder.path.parent.parent == tmp_path / "results"

    def test_sudo_s_user_gets_what_was_made_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Invariant: no folder that was there before the run changes its owner (it may be /tmp)."""
        given: set[Path] = set()
        monkeypatch.setattr("os.geteuid", lambda: 0)
        monkeypatch.setattr("os.chown", lambda path, user, group, follow_symlinks: given.add(Path(path)))
        monkeypatch.setenv("SUDO_UID", "1000")
        monkeypatch.chdir(tmp_path)
        for root, made in [("there", ["there/t"]), ("new/below", ["new", "new/below", "new/below/t"]), ("there", [])]:
            Path("there").mkdir(exist_ok=True)
            given.clear()
            with RunFolder.create("t", seed=1, root=Path(root)) as folder:
                pass
            assert folder.path in given and folder.path / "events.jsonl" in given
            outside = {path for path in given if folder.path not in (path, *path.parents)}
            assert outside == {tmp_path / name for name in made}

    def test_unknown_events_and_fields_are_refused(self, tmp_path: Path) -> None:
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        for name, fields in [("nonsense", {}), ("note", {}), ("note", {"text": "x", "more": 1})]:
            with pytest.raises(ValueError, match="event"):
                folder.event(name, **fields)
        assert (folder.path / "events.jsonl").read_text() == ""

    def test_events_from_many_threads_are_whole_lines(self, tmp_path: Path) -> None:
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        seen: list[str] = []
        folder.subscribe(lambda event: seen.append(event["text"]))

        def report(number: int) -> None:
            for i in range(50):
                folder.event("note", text=f"{number}:{i} " + "x" * 200)

        threads = [threading.Thread(target=report, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        written = [json.loads(line)["text"] for line in (folder.path / "events.jsonl").read_text().splitlines()]
        assert written == seen and len(set(written)) == 400

    def test_summary_is_whole_or_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk while the summary is written leaves no half summary under its name."""
        folder = RunFolder.create("t", seed=1, root=tmp_path)

        def full(self: Path, data: str, *args: object) -> int:
            with self.open("w") as file:
                file.write(data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            folder.finish(make_summary(folder))
        assert not (folder.path / "summary.json").exists()


class TestSchema:
    def test_published_schema_is_the_models(self) -> None:
        """If this fails: `python -m testbed.record.summary` writes the file again."""
        assert json.loads(SCHEMA_FILE.read_text()) == summary_schema()

    def test_stable_fields_are_there(self) -> None:
        """The names that the outside relies on (README, 'fields that stay stable')."""
        data = json.loads(load_summary(FIXTURE).to_json())
        assert data["ok"] is True
        for name in ("blackout_ms", "phases_ms", "app_exit_code", "partner_gap_ms", "rolled_back"):
            assert name in data["migrations"][0]
        assert list(data["migrations"][0]["phases_ms"]) == list(PHASES)

    def test_unknown_field_is_refused(self) -> None:
        data = json.loads(FIXTURE.read_text()) | {"surprise": 1}
        with pytest.raises(ValueError, match="surprise"):
            Summary.model_validate(data)


class TestStatistics:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.integers(0, 2**32))
    def test_interval_holds_the_median_and_lies_in_the_samples(self, values: list[float], seed: int) -> None:
        found = estimate(values, seed=seed)
        assert found.low is not None and found.high is not None
        slack = 1e-9 * max(1.0, *(abs(value) for value in values))
        assert min(values) - slack <= found.low <= found.median + slack
        assert found.median - slack <= found.high <= max(values) + slack
        assert found == estimate(values, seed=seed)

    def test_coverage_is_near_what_it_claims(self) -> None:
        """Of 200 samples of 25 from a skewed law, the interval must hold the true median about 95 % of the time."""
        source = np.random.default_rng(5)
        truth = float(np.log(2))  # median of the exponential law
        held = 0
        for _ in range(200):
            found = estimate(source.exponential(size=25).tolist())
            assert found.low is not None and found.high is not None
            held += found.low <= truth <= found.high
        assert 180 <= held <= 199

    def test_one_sample_has_no_interval(self) -> None:
        found = estimate([3.5])
        assert (found.median, found.low, found.high, found.n) == (3.5, None, None, 1)

    @pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
    def test_no_number_no_estimate(self, values: list[float]) -> None:
        with pytest.raises(ValueError):
            estimate(values)

    def test_paired_ratio_cancels_drift(self) -> None:
        """Both sides slow down together: the ratio's interval stays narrow although each side's samples are wide."""
        base = np.linspace(100, 200, 15)
        found = paired_ratio((base * 0.97).tolist(), base.tolist())
        assert found.low == pytest.approx(0.97) and found.high == pytest.approx(0.97)
        with pytest.raises(ValueError, match="pairs"):
            paired_ratio([1.0], [1.0, 2.0])
        with pytest.raises(ValueError, match="zero"):
            paired_ratio([1.0], [0.0])

    @pytest.mark.parametrize(
        ("value", "text"), [(0.0, "0"), (1234.4, "1230"), (0.012345, "0.0123"), (-99.96, "-100"), (5.0, "5.00")]
    )
    def test_significant(self, value: float, text: str) -> None:
        assert significant(value) == text


class TestRepeats:
    def run(self, folder: RunFolder, name: str, **kwargs: float | bool | int) -> Summary:
        path = folder.path / name
        path.mkdir()
        inner = RunFolder(path, "t", 1)
        summary = make_summary(inner, **kwargs)  # type: ignore[arg-type]
        inner.finish(summary)
        return summary

    def test_medians_and_references(self, tmp_path: Path) -> None:
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        runs = [self.run(folder, f"run-{i}", blackout=value) for i, value in enumerate([400.0, 100.0, 200.0], 1)]
        summary = summarise_repeats(folder, runs)
        assert summary.ok
        assert summary.migrations[0].blackout_ms == 200.0
        assert summary.migrations[0].phases_ms == {"freeze": 100.0}
        assert summary.migrations[0].app_exit_code == 0
        assert summary.statistics["migrations[0].blackout_ms"].values == [400.0, 100.0, 200.0]
        assert [run.path for run in summary.repeats] == ["run-1", "run-2", "run-3"]
        folder.finish(summary)
        assert load_summary(folder.path) == summary

    def test_a_failure_is_not_averaged_away(self, tmp_path: Path) -> None:
        """One bad run of three: not ok, its error and exit code are shown, its blackout is not among the samples."""
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        runs = [
            self.run(folder, "run-1", blackout=100.0),
            self.run(folder, "run-2", blackout=9999.0, ok=False, code=7),
            self.run(folder, "run-3", blackout=300.0),
        ]
        summary = summarise_repeats(folder, runs)
        migration = summary.migrations[0]
        assert not summary.ok and not migration.ok and migration.rolled_back
        assert migration.error == "restore failed" and migration.app_exit_code == 7
        assert summary.statistics["migrations[0].blackout_ms"].values == [100.0, 300.0]

    def test_a_run_that_never_exited_has_no_exit_code(self, tmp_path: Path) -> None:
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        run = self.run(folder, "run-1")
        run.migrations[0].app_exit_code = None
        assert summarise_repeats(folder, [run]).migrations[0].app_exit_code is None

    def test_constants_are_no_measurements(self) -> None:
        data = json.loads(FIXTURE.read_text())
        paths = over_runs([data])
        assert "migrations[0].index" not in paths and "migrations[0].phases_ms.freeze" in paths


class TestCaptures:
    def pcap(self, path: Path, frames: int, torn: int = 0) -> Path:
        record = struct.pack("<IIII", 1, 2, 60, 1500) + bytes(60)
        head = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 60, 1)
        path.write_bytes(head + record * frames + record[:torn])
        return path

    @pytest.mark.parametrize("torn", [0, 10, 16, 40])
    def test_frames_are_counted(self, tmp_path: Path, torn: int) -> None:
        assert count_frames(self.pcap(tmp_path / "a.pcap", 7, torn)) == 7

    def test_empty_captures(self, tmp_path: Path) -> None:
        assert count_frames(self.pcap(tmp_path / "a.pcap", 0)) == 0
        (tmp_path / "b.pcap").write_bytes(b"")
        assert count_frames(tmp_path / "b.pcap") == 0

    def test_all_of_a_host_and_none_of_another(self, tmp_path: Path) -> None:
        folder = RunFolder.create("t", seed=1, root=tmp_path)
        for name in ("h1", "h1-migration1", "h1-migration2", "h10-migration1"):
            self.pcap(folder.pcap(name), 3)
        paths = ["pcaps/h1.pcap", "pcaps/h1-migration1.pcap", "pcaps/h1-migration2.pcap"]
        assert [capture.path for capture in found(folder, "h1")] == paths
        assert found(folder, "h2") == []
