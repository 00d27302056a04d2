"""Install a CRIU that works on the running kernel into a private prefix, leaving the system's packages as they are.

    python3 -m testbed.checkpoint.install_criu [--prefix DIR] [--force]

Debian 12 has CRIU 3.17, which fails on new kernels, and Debian 13 has 4.1, which cannot dump sockets on them. So `apt`
fetches `criu` with *all* its dependencies, libc included, from a newer suite of the archive that the machine already
uses, with a package list, a cache and an empty package status of its own; `dpkg-deb -x` unpacks them into one
directory, and `criu_binary` starts it through that directory's dynamic loader. About 9 MB are fetched and 30 MB
unpacked; nothing is configured, and no system file changes.

Idempotent: if a CRIU works (in the prefix, in $TESTBED_CRIU or the system's), it does nothing. Standard library only,
because it runs before the virtual environment exists.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.base.errors import EnvironmentProblem, TestbedError
from testbed.checkpoint import criu_binary

SUITES = ("forky", "sid")
"""Debian suites tried in order; both carried CRIU 4.2.1 in November 2026."""
KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")
_APT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive that this machine's apt is configured for."""

    uri: str
    options: str
    """Options of the one-line format, such as `[signed-by=…] `, or an empty string."""


def archives(os_release: Path = Path("/etc/os-release")) -> list[Archive]:
    """List the archives of this Debian release that apt already uses, so that a local mirror is used.

    Updates and security archives are left out, because their newer suites have no criu. Archives of others, which may
    also name their suite after the release, come last. Raises EnvironmentProblem if there is none.
    """
    fields = (line.partition("=") for line in os_release.read_text().splitlines())
    release = {key: value.strip('"') for key, _, value in fields}
    own = {release.get("VERSION_CODENAME", ""), "stable", "testing", "unstable", "sid"}
    answer = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)",
            "Created-By: Packages",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found = []
    for line in answer.stdout.splitlines():
        uri, suite, component = line.split("\t")
        if suite in own and component == "main":
            found.append(Archive(uri, _options(uri)))
    if not found:
        raise EnvironmentProblem("apt is configured for no archive of this Debian release", hint="see sources.list(5)")
    return sorted(dict.fromkeys(found), key=lambda archive: not archive.uri.rstrip("/").endswith("debian"))


def _options(uri: str, folder: Path = Path("/etc/apt")) -> str:
    """How packages of `uri` are verified: by Debian's keyring, or not if the administrator trusts the archive."""
    files = [folder / "sources.list", *(folder / "sources.list.d").glob("*")]
    text = "\n\n".join(path.read_text(errors="replace") for path in files if path.is_file())
    # In the one-line format each line is an entry, in deb822 each paragraph.
    lines = (line for line in text.splitlines() if re.match(r"deb\b.*\btrusted=yes", line))
    paragraphs = (part for part in re.split(r"\n\s*\n", text) if re.search(r"^Trusted:\s*yes", part, re.I | re.M))
    if any(uri.rstrip("/") in entry for entry in (*lines, *paragraphs)):
        return "[trusted=yes] "
    keyring = next((path for path in KEYRINGS if Path(path).exists()), None)
    return f"[signed-by={keyring}] " if keyring else ""


def _run(command: list[str], what: str) -> str:
    """Run a command and return its output. Raises EnvironmentProblem with its last lines."""
    try:
        answer = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_APT_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{what}: {error}") from error
    if answer.returncode != 0:
        raise EnvironmentProblem(f"{what} failed: " + " / ".join(answer.stdout.strip().splitlines()[-4:]))
    return answer.stdout


def fetch(work: Path, archive: Archive, suite: str, wanted: Sequence[str] = ("criu",)) -> list[Path]:
    """Download packages and their dependencies from one suite into `work`; return the packages' paths.

    Raises EnvironmentProblem. `wanted` is for tests that run other programs of a newer suite.
    """
    for folder in ("lists/partial", "cache/archives/partial", "empty"):
        (work / folder).mkdir(parents=True)
    (work / "sources.list").write_text(f"deb {archive.options}{archive.uri} {suite} main\n")
    (work / "status").touch()
    options = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": work / "empty",
        "Dir::Etc::preferences": work / "empty/none",
        "Dir::Etc::preferencesparts": work / "empty",
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::State::extended_states": work / "extended_states",
        "Dir::Cache": work / "cache",
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Retries": "2",
        "APT::Default-Release": "",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
    }
    apt = ["apt-get", "-q", "-y", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    _run([*apt, "update"], f"reading the package list of Debian {suite} from {archive.uri}")
    _run([*apt, "--download-only", "install", *wanted], f"fetching {' '.join(wanted)} from Debian {suite}")
    packages = sorted((work / "cache/archives").glob("*.deb"))
    if not packages:
        raise EnvironmentProblem(f"apt fetched no package from Debian {suite} at {archive.uri}")
    return packages


def install(prefix: Path = criu_binary.PREFIX) -> criu_binary.Criu:
    """Recreate `prefix` from the first suite whose CRIU works here. Raises EnvironmentProblem with every reason."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise EnvironmentProblem(
                f"{tool} is missing: CRIU can be fetched only on Debian and its derivatives",
                hint=f"install CRIU {'.'.join(map(str, criu_binary.MINIMUM))} or newer and set TESTBED_CRIU to it",
            )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    refused = []
    for archive in archives():
        for suite in SUITES:
            with tempfile.TemporaryDirectory(prefix=".criu-", dir=prefix.parent) as folder:
                work = Path(folder)
                unpacked = work / "root"
                try:
                    for package in fetch(work / "apt", archive, suite):
                        _run(["dpkg-deb", "-x", str(package), str(unpacked)], f"unpacking {package.name}")
                    command = criu_binary.prefix_command(unpacked)
                    if command is None:
                        raise EnvironmentProblem("the packages contain no criu or no dynamic loader")
                    criu_binary.check(command)
                except EnvironmentProblem as problem:
                    refused.append(f"{suite} from {archive.uri}: {problem.message}")
                    continue
                _replace(prefix, unpacked)
            final = criu_binary.prefix_command(prefix)
            assert final is not None, "the directory was checked under its old name"
            return criu_binary.Criu(tuple(final), criu_binary.check(final), str(prefix))
    raise EnvironmentProblem("no CRIU could be installed: " + "; ".join(refused))


def _replace(prefix: Path, fresh: Path) -> None:
    """Move `fresh` to `prefix`; an old prefix is renamed first and deleted with the temporary folder."""
    if prefix.exists():
        old = fresh.parent / "old"
        prefix.rename(old)
    fresh.chmod(0o755)
    fresh.rename(prefix)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0 if a CRIU works afterwards."""
    parser = argparse.ArgumentParser(prog="install_criu", description="Get a CRIU that works on the running kernel.")
    parser.add_argument("--prefix", type=Path, default=criu_binary.PREFIX, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="fetch it even if one works already")
    options = parser.parse_args(arguments)
    try:
        criu = None
        if not options.force:
            try:
                criu = criu_binary.usable(options.prefix)
            except EnvironmentProblem:
                criu = None
        if criu is None:
            if os.geteuid() != 0:
                raise EnvironmentProblem("CRIU needs root", hint="run it with sudo")
            criu = install(options.prefix)
    except TestbedError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    print(f"criu {'.'.join(map(str, criu.version))} ({criu.origin})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
