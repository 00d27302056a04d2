"""A release: wheel and sdist hold everything, and the installed wheel works without the checkout.

The archives are built from a copy of the project and without isolation. The wheel is installed without its dependencies
into an environment of its own, which finds the packages of the test environment behind its own; so nothing is
downloaded.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import testbed

ROOT = Path(__file__).parents[3]
PACKAGES = ("softroce_ext", "testbed")
FOLDERS = (*PACKAGES, "tests", "docs", "experiments", "benchmarks", "topologies", ".ci")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "bootstrap")
PIP = (sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--quiet")
INSTALL = ("install", "--no-deps", "--no-index", "--no-compile", "--ignore-installed")


class Release(NamedTuple):
    """A copy of the project, and what was built from it."""

    source: Path
    wheel: Path
    sdist: Path

    def files(self, *folders: str) -> set[str]:
        """The files below `folders` of the copy, named as in the archives."""
        found = (path for folder in folders for path in (self.source / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(self.source)) for path in found}


def environment(python_path: Path | None = None) -> dict[str, str]:
    """This process's environment, in which Python finds nothing of the checkout."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return ours if python_path is None else {**ours, "PYTHONPATH": str(python_path)}


def call(*words: str | Path, cwd: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, env=environment(python_path), capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def succeed(*words: str | Path, cwd: Path) -> None:
    result = call(*words, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The sdist, built from the copy, and the wheel, built from the sdist."""
    pytest.importorskip("build", reason="needs the development extra: pip install --editable '.[dev]'")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy2(ROOT / name, source / name)
    # Beginning elsewhere, because a folder `build` in the current one would hide the module.
    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return Release(source, wheel, sdist)


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    # Beginning elsewhere, because the metadata in an unpacked sdist would pass for an installation.
    succeed(*PIP, "--python", folder / "bin/python", *INSTALL, release.wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "test-environment.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def target(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `pip install --target` has written the wheel to."""
    folder = tmp_path_factory.mktemp("target")
    succeed(*PIP, *INSTALL, "--target", folder, release.wheel, cwd=folder)
    return folder


def test_the_version_is_written_in_one_place(release: Release) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "testbed.__version__"}
    assert f"-{testbed.__version__}-" in release.wheel.name
    assert release.sdist.name.endswith(f"-{testbed.__version__}.tar.gz")


def test_the_installation_page_names_this_wheel(release: Release) -> None:
    assert release.wheel.name in (ROOT / "docs" / "install.md").read_text()


def test_the_changelog_has_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    assert headings[1].startswith(f"## [{testbed.__version__}] - ")


def test_the_wheel_holds_both_packages_with_their_data(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as wheel:
        inside = set(wheel.namelist())
    wanted = release.files(*PACKAGES)
    assert {"testbed/py.typed", "softroce_ext/native/bridge/bridge.h", "testbed/schema/topology.schema.json"} <= wanted
    assert wanted - inside == set()
    others = inside - wanted
    assert {name for name in others if ".dist-info/" not in name and ".data/data/share/" not in name} == set()
    shipped = {name.partition(".data/data/share/migros-testbed/")[2] for name in others}
    assert release.files("topologies") - shipped == set()


def test_the_sdist_holds_the_whole_project(release: Release) -> None:
    with tarfile.open(release.sdist) as sdist:
        inside = {member.name.partition("/")[2]: member.mode for member in sdist.getmembers()}
    assert (release.files(*FOLDERS) | set(FILES)) - set(inside) == set()
    assert inside["bootstrap"] & 0o111 and inside[".ci/run"] & 0o111


def test_the_installed_copy_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import testbed, softroce_ext; print(testbed.__file__, softroce_ext.__file__)"
    result = call(installed / "python", "-c", code, cwd=tmp_path)
    places = result.stdout.split()
    assert len(places) == 2, result.stderr
    assert all(Path(place).is_relative_to(installed.parent) for place in places), places


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("testbed", "--version"), 0, f"testbed {testbed.__version__}\n"),
        (("python", "-m", "testbed", "--version"), 0, f"testbed {testbed.__version__}\n"),
        (("testbed", "validate", "migrate_pair"), 0, "migrate_pair: fine"),
        (("testbed", "validate", "migrate_pear"), 2, "did you mean migrate_pair?"),
        (("testbed", "validate", "bad.yaml"), 2, "bad.yaml:4: links[0].ends[1]: no such host or switch (got s9)"),
        (("testbed", "schema"), 0, '"$schema"'),
        (("testbed", "schema", "summary"), 0, '"$schema"'),
        (("python", "-m", "softroce_ext", "--help"), 0, "--interface"),
        (("python", "-m", "softroce_ext.simulation", "--schedules", "20", "--jobs", "1"), 0, "invariants violated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_it_works_without_the_checkout(
    installed: Path, tmp_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nhosts: {h1: {}}\nswitches: [s1]\nlinks: [[h1, s9]]\n")
    result = call(installed / words[0], *words[1:], cwd=tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_runs_to_its_end(installed: Path, tmp_path: Path) -> None:
    """Its verdict depends on the machine and the user: 0 or, when something is missing, 3."""
    result = call(installed / "testbed", "doctor", cwd=tmp_path)
    verdict = {0: "The testbed can run here.", 3: "The testbed cannot run here; missing: "}.get(result.returncode)
    assert verdict is not None and verdict in result.stdout, result.stdout + result.stderr


def test_the_c_parts_are_built_from_the_installed_sources(installed: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from softroce_ext.native import build\n"
        "build.CACHE = pathlib.Path(sys.argv[1])\n"
        "print(build.SOURCES, *map(build.path, build.names()))\n"
    )
    result = call(installed / "python", "-c", code, tmp_path / "cache", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    sources, *outputs = map(Path, result.stdout.split())
    assert sources.is_relative_to(installed.parent)
    assert {output.stem for output in outputs} >= {"app_init", "bridge", "guard"}
    assert all(output.is_relative_to(tmp_path / "cache") and output.stat().st_size for output in outputs)


def test_a_run_records_the_version_where_there_is_no_commit(installed: Path, tmp_path: Path) -> None:
    code = "from testbed.record import versions; e = versions.collect(); print(e.packages['migros-testbed'], e.source)"
    result = call(installed / "python", "-c", code, cwd=tmp_path)
    assert result.stdout == f"{testbed.__version__} None\n", result.stderr


def test_shipped_topologies_are_found_beside_the_package(target: Path, tmp_path: Path) -> None:
    result = call(sys.executable, "-m", "testbed", "validate", "migrate_pair", cwd=tmp_path, python_path=target)
    assert (result.returncode, result.stderr) == (0, "")


def test_missing_dependencies_are_named_without_a_traceback(target: Path, tmp_path: Path) -> None:
    """Without `bootstrap` beside the package, the hint names pip."""
    result = call(sys.executable, "-S", "-m", "testbed", "doctor", cwd=tmp_path, python_path=target)
    assert result.returncode == 3
    first, hint = result.stderr.splitlines()
    assert first == f"testbed: this Python ({sys.executable}) lacks the testbed's dependencies"
    assert hint == "  hint: install the testbed's wheel with pip, without --no-deps"
