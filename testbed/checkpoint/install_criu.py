"""Install a CRIU that works on new kernels into a private prefix, without touching the system's libc.

Debian 12 has CRIU 3.17, which fails on new kernels; Debian 13 has 4.1, which cannot dump TCP sockets on kernel 6.18.
The first good one is 4.2, in newer suites. This script takes the archive hosts that the machine's apt already uses,
with the suite's name replaced, into an apt directory of its own with an *empty* dpkg status: apt then resolves
everything that CRIU needs down to libc. The packages are unpacked side by side (never installed) and CRIU is started through the
prefix's own dynamic linker; with the system's, a restore fails with "PR_SET_MM_MAP: -16".

    /var/lib/migros-testbed/criu/
        bin/criu          the wrapper to call
        root/             the unpacked packages
        version           of the Debian package, written last: its presence means complete

Run as a script by the system's python3 (standard library only, before there is a virtual environment):
`install_criu.py [--prefix DIR] [--force]`. Exit codes: 0 installed or already there, 3 not possible, with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = Path("/var/lib/migros-testbed/criu")
SUITES = ("forky", "sid")
"""Debian suites that have a new enough CRIU, tried in this order."""
LOWEST = (4, 2)
"""4.1 cannot dump TCP or UDP sockets on kernel 6.18 ("Can't get 1:16 opt")."""


class CannotInstall(Exception):
    """The reason, for the user."""


@dataclass(frozen=True, slots=True)
class Source:
    """One archive of the machine's apt configuration."""

    uri: str
    suite: str
    options: str
    """Options of the one-line format in brackets (`[signed-by=…]`), or an empty string."""


def sources(folder: Path = Path("/etc/apt")) -> Iterator[Source]:
    """Every binary archive with a `main` component that apt is configured for, in both of its formats."""
    lists = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*.list"))]
    for path in lists:
        for line in path.read_text().splitlines() if path.is_file() else []:
            match = re.match(r"\s*deb\s+(\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.*)", line)
            if match and "main" in match[4].split("#")[0].split():
                yield Source(match[2], match[3], (match[1] or "").strip())
    for path in sorted((folder / "sources.list.d").glob("*.sources")):
        text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
        for stanza in re.split(r"\n\s*\n", text):
            fields = _fields(stanza)
            if fields.get("enabled", "yes").lower() in ("no", "false") or "deb" not in fields.get("types", "").split():
                continue
            if "main" not in fields.get("components", "").split():
                continue
            # An inline key (several lines) cannot be said in the one-line format; apt's trusted keys then decide.
            key = fields.get("signed-by", "")
            options = [f"signed-by={key}"] if key.startswith("/") and " " not in key else []
            options += ["trusted=yes"] if fields.get("trusted", "").lower() == "yes" else []
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield Source(uri, suite, f"[{' '.join(options)}]" if options else "")


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in stanza.splitlines():
        if line[:1].isspace():
            fields[key] = f"{fields.get(key, '')} {line.strip()}".strip()
        elif ":" in line:
            key, value = line.split(":", 1)
            key = key.strip().lower()
            fields[key] = value.strip()
    return fields


def debian_archives(folder: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")) -> list[Source]:
    """The archives of this Debian release itself, without its updates, security and other people's archives."""
    codename = ""
    for line in os_release.read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            codename = line.partition("=")[2].strip().strip('"')
    found = [source for source in sources(folder) if source.suite in (codename, "stable", "testing", "sid")]
    # Debian's own end in /debian almost everywhere; others that name their suite after the release come last.
    return sorted(dict.fromkeys(found), key=lambda source: not source.uri.rstrip("/").endswith("debian"))


class PrivateApt:
    """apt with lists, cache and (empty) dpkg status of its own below `folder`, knowing one archive and suite."""

    def __init__(self, folder: Path, source: Source, suite: str) -> None:
        self.archives = folder / "cache/archives"
        for path in (folder / "lists/partial", self.archives / "partial"):
            path.mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(f"deb {source.options} {source.uri} {suite} main\n")
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Cache::archives": self.archives,
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
        }
        self._options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def run(self, program: str, *words: str) -> str:
        """Output of one apt command. Errors: CannotInstall with apt's own words."""
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        result = subprocess.run(
            [program, *self._options, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise CannotInstall(" / ".join(lines[-3:]) or f"{program} ended with {result.returncode}")
        return result.stdout


def version_tuple(text: str) -> tuple[int, ...]:
    """`4.2-1+b1` → (4, 2); an unreadable text gives ()."""
    match = re.search(r"(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def _download(folder: Path, source: Source, suite: str) -> tuple[str, list[Path]]:
    """Version and package files of CRIU and all it needs."""
    apt = PrivateApt(folder, source, suite)
    apt.run("apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any")
    match = re.search(r"^ *Candidate: (\S+)", apt.run("apt-cache", "policy", "criu"), re.MULTILINE)
    version = match[1] if match else "(none)"
    if version_tuple(version) < LOWEST:
        raise CannotInstall(f"{suite} offers criu {version}, needed is {LOWEST[0]}.{LOWEST[1]} or newer")
    apt.run("apt-get", "install", "-y", "-qq", "--download-only", "criu")
    return version, sorted(apt.archives.glob("*.deb"))


_WRAPPER = """#!/bin/sh
# Starts CRIU with the libraries that it was unpacked with, not the system's.
exec {linker} --library-path {libraries} {program} "$@"
"""


def _unpack(packages: list[Path], prefix: Path, staging: Path) -> None:
    """Unpack into `staging`, with a wrapper that is right once `staging` has been renamed to `prefix`."""
    root = staging / "root"
    root.mkdir(parents=True)
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", package, root], check=True, stdin=subprocess.DEVNULL)
    linkers = [path for path in root.rglob("ld-linux-*.so.*") if path.is_file() and not path.is_symlink()]
    programs = [path for path in root.rglob("criu") if path.is_file() and path.parent.name in ("sbin", "bin")]
    if not linkers or not programs:
        raise CannotInstall(f"the packages have no {'criu' if linkers else 'dynamic linker'} in them")
    folders = sorted({path.parent for path in (root / "usr").rglob("lib*.so.*")})
    libraries = ":".join(str(prefix / path.relative_to(staging)) for path in folders)
    wrapper = staging / "bin/criu"
    wrapper.parent.mkdir()
    wrapper.write_text(
        _WRAPPER.format(
            linker=shlex.quote(str(prefix / linkers[0].relative_to(staging))),
            libraries=shlex.quote(libraries),
            program=shlex.quote(str(prefix / programs[0].relative_to(staging))),
        )
    )
    wrapper.chmod(0o755)


def works(prefix: Path) -> str | None:
    """None if the CRIU in `prefix` is complete and starts; else why not."""
    if not (prefix / "version").is_file():
        return "not installed"
    try:
        result = subprocess.run(
            [prefix / "bin/criu", "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode != 0:
        return (result.stderr or result.stdout).strip()
    return None if version_tuple(result.stdout) >= LOWEST else f"too old: {result.stdout.strip()}"


def kernel_check(prefix: Path) -> str | None:
    """None if `criu check` is content with this kernel; else its words."""
    result = subprocess.run(
        [prefix / "bin/criu", "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return None if result.returncode == 0 else (result.stderr or result.stdout).strip()


def install(prefix: Path = PREFIX) -> str:
    """Install, replacing what is there; gives the version. Errors: CannotInstall with what was tried."""
    archives = debian_archives()
    if not archives:
        raise CannotInstall("apt is configured for no Debian archive with a `main` component")
    reasons: list[str] = []
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        for source in archives:
            # On the same file system as the prefix, so that the last step is a rename.
            with tempfile.TemporaryDirectory(prefix=".criu-", dir=prefix.parent) as text:
                folder = Path(text)
                folder.chmod(0o755)
                try:
                    version, packages = _download(folder / "apt", source, suite)
                    staging = folder / "new"
                    _unpack(packages, prefix, staging)
                except (CannotInstall, OSError, subprocess.SubprocessError) as error:
                    reasons.append(f"{suite}: {error}")
                    continue
                (staging / "version").write_text(version + "\n")
                if prefix.exists():
                    prefix.rename(folder / "old")
                staging.rename(prefix)
            problem = works(prefix)
            if problem is None:
                return version
            reasons.append(f"{suite}: criu {version} does not start: {problem}")
            shutil.rmtree(prefix, ignore_errors=True)
    raise CannotInstall("\n  ".join(dict.fromkeys(reasons)))


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description="Install CRIU into a private prefix.")
    parser.add_argument("--prefix", type=Path, default=PREFIX, help="folder to install into (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="install even if a working one is there")
    options = parser.parse_args(arguments)
    prefix: Path = options.prefix.absolute()
    if options.force or works(prefix) is not None:
        try:
            install(prefix)
        except CannotInstall as error:
            print(f"no CRIU: {error}", file=sys.stderr)
            print("hint: set TESTBED_CRIU to the path of a CRIU 4.2 or newer", file=sys.stderr)
            return 3
    print(f"criu {(prefix / 'version').read_text().strip()} in {prefix}")
    problem = kernel_check(prefix)
    if problem is not None:
        print(f"criu check does not pass on this kernel: {problem}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
