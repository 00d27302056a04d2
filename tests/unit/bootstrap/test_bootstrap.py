"""What can be said about the installation without installing: calls, archives, verification of packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from testbed.base.errors import EnvironmentProblem
from testbed.checkpoint import install_criu

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("script", ["bootstrap", ".ci/run"])
def test_scripts_parse_and_may_be_executed(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_unknown_word_is_refused_before_anything_happens() -> None:
    result = subprocess.run([ROOT / "bootstrap", "tset"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "bootstrap: unknown argument tset; allowed: (nothing), demo, test\n"


def test_help_lists_the_calls() -> None:
    result = subprocess.run([ROOT / "bootstrap", "--help"], capture_output=True, text=True, check=True)
    assert [word for word in ("./bootstrap demo", "./bootstrap test") if word not in result.stdout] == []


ONE_LINE = "deb [trusted=yes] file:/srv/mirror bookworm main\ndeb http://a.example/debian bookworm main\n"
DEB822 = """\
Types: deb
URIs: file:/srv/local
Suites: trixie
Components: main
Trusted: yes

Types: deb
URIs: http://b.example/debian
Suites: trixie
Components: main
# Trusted: yes
"""


@pytest.mark.parametrize(
    ("uri", "trusted"),
    [
        ("file:/srv/mirror/", True),
        ("file:/srv/local/", True),
        ("http://a.example/debian/", False),
        ("http://b.example/debian/", False),
    ],
)
def test_unverified_packages_only_where_the_administrator_says_so(tmp_path: Path, uri: str, trusted: bool) -> None:
    """Invariant: an archive is trusted without a signature exactly if its own entry says so."""
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/local.sources").write_text(DEB822)
    assert (install_criu._options(uri, tmp_path) == "[trusted=yes] ") is trusted


def test_archives_of_another_release_are_not_taken(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('VERSION_CODENAME="nonesuch"\n')
    with pytest.raises(EnvironmentProblem, match="no archive of this Debian release"):
        install_criu.archives(release)
