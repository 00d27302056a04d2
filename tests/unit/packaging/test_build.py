"""A release: wheel and sdist hold everything, and the installed wheel works without the checkout.

The wheel is installed without its dependencies into an environment of its own, which finds the packages of the test
environment behind its own; so nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import testbed

ROOT = Path(__file__).parents[3]
SKIPPED = {".git", ".venv", "build", "dist", "results", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, built from a copy of the tree."""
    source = tmp_path_factory.mktemp("build") / "source"
    shutil.copytree(ROOT, source, ignore=lambda _, names: [n for n in names if n in SKIPPED or n.endswith(".egg-info")])
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", archives[0]], check=True)
    behind = site.getsitepackages()
    (found,) = folder.glob("lib/python*/site-packages")
    (found / "test-environment.pth").write_text("\n".join(behind) + "\n")
    return folder / "bin"


def run(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [installed / words[0], *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_version_stands_in_one_place(archives: tuple[Path, Path]) -> None:
    wheel, sdist = archives
    assert f"-{testbed.__version__}-" in wheel.name and sdist.name.endswith(f"-{testbed.__version__}.tar.gz")
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"## [{testbed.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_installation_page_names_this_wheel(archives: tuple[Path, Path]) -> None:
    assert archives[0].name in (ROOT / "docs" / "install.md").read_text()


def test_both_archives_hold_everything(archives: tuple[Path, Path]) -> None:
    data = [
        path.relative_to(ROOT)
        for pattern in ("**/*.c", "**/*.h", "**/py.typed", "schema/*.json")
        for package in ("softroce_ext", "testbed")
        for path in (ROOT / package).glob(pattern)
    ]
    modules = [path.relative_to(ROOT) for name in ("softroce_ext", "testbed") for path in (ROOT / name).rglob("*.py")]
    topologies = [path.name for path in (ROOT / "topologies").glob("*.yaml")]
    with zipfile.ZipFile(archives[0]) as wheel:
        inside = set(wheel.namelist())
    assert {str(path) for path in (*data, *modules)} <= inside
    assert {name for name in topologies if not any(entry.endswith(f"/topologies/{name}") for entry in inside)} == set()
    with tarfile.open(archives[1]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {str(path) for path in (*data, *modules)} | {f"topologies/{name}" for name in topologies}
    wanted |= {"bootstrap", "README.md", "CHANGELOG.md", "LICENSE", "docs/index.md", "tests/conftest.py"}
    assert wanted - inside == set()


def test_the_installed_copy_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import testbed, softroce_ext; print(testbed.__file__, softroce_ext.__file__)"
    result = run(installed, "python", "-c", code, cwd=tmp_path)
    assert all(path.startswith(str(installed.parent)) for path in result.stdout.split()), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("testbed", "--version"), 0, f"testbed {testbed.__version__}\n"),
        (("testbed", "validate", "migrate_pair"), 0, "migrate_pair: fine"),
        (("testbed", "validate", "migrate_pear"), 2, "did you mean migrate_pair?"),
        (("testbed", "schema"), 0, '"$schema"'),
        (("testbed", "schema", "summary"), 0, '"$schema"'),
        (("python", "-m", "softroce_ext", "--help"), 0, "--interface"),
        (("python", "-m", "softroce_ext.simulation", "--schedules", "20", "--jobs", "1"), 0, "invariants violated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_it_works_without_the_checkout(
    installed: Path, tmp_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    result = run(installed, *words, cwd=tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_runs_to_its_end(installed: Path, tmp_path: Path) -> None:
    """Its verdict depends on the machine and the user: 0 or, when something is missing, 3."""
    result = run(installed, "testbed", "doctor", cwd=tmp_path)
    assert result.returncode in (0, 3), result.stdout + result.stderr
    assert "The testbed can" in result.stdout + result.stderr


def test_the_c_parts_are_built_from_the_installed_sources(installed: Path, tmp_path: Path) -> None:
    code = "from softroce_ext.native import build; print(build.SOURCES); [build.path(name) for name in build.names()]"
    result = run(installed, "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(installed.parent))
