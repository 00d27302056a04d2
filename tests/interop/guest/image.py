"""Builds the guest's kernel and initramfs from Debian packages: `python -m tests.interop.guest.image` prints where.

apt resolves and fetches the packages into a cache of its own, as if for an empty system, so nothing of the machine
changes. Only the programs listed here, the libraries they need, Python and the kernel modules go into the image. A
finished image is kept under a name made from all package versions and from this builder's own text.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from testbed.base.errors import EnvironmentProblem

STATE = Path("/var/lib/migros-testbed/interop")
HERE = Path(__file__).parent

PACKAGES = (
    "linux-image-amd64", "busybox-static", "iproute2", "ethtool", "rdma-core", "ibverbs-utils", "ibverbs-providers",
    "rdmacm-utils", "perftest", "qperf", "python3", "python3-pyverbs",
)  # fmt: skip
"""The stock kernel: the cloud variant has no rdma_rxe."""
PROGRAMS = re.compile(
    r"(ibv_\w+|ib_\w+(lat|bw)|rping|ucmatose|udaddy|mckey|rstream|riostream|rdma_(x?client|x?server)|cmtime|qperf|python3[.\d]*|ip|rdma"
    r"|busybox|ethtool|ld-linux-x86-64\.so\.2|librxe-\w+\.so|rxe\.driver|libnss_files\.so\.2|libgcc_s\.so\.1)"
)
"""Names of the files that are wanted, wherever their package has them."""
MODULES = (
    "virtio_pci", "virtio_net", "virtio_console", "virtio_rng", "crc32_generic", "crc32_pclmul",
    "rdma_rxe", "ib_uverbs", "rdma_ucm",
)  # fmt: skip
NO_PYTHON = re.compile(
    r"/(test|tests|lib2to3|idlelib|tkinter|ensurepip|pydoc_data|turtledemo|__pycache__|config-3[^/]*)/|\.a$|\.pyc$"
    r"|/(_ssl|_sqlite3|_curses\w*|readline|_tkinter|_dbm|_gdbm|audioop|nis|_codecs_\w+|_test\w*)\.cpython"
)
LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib")
_SECONDS = 900.0


class Image(NamedTuple):
    """A finished image."""

    kernel: Path
    """Uncompressed if it could be unpacked: emulation would take seconds for that at each boot."""
    initramfs: Path
    version: str
    """Of the kernel, as `uname -r` prints it."""


def _run(*words: str | Path, what: str, **more: object) -> str:
    """Output of a command. Raises EnvironmentProblem with its last lines."""
    try:
        answer = subprocess.run(
            [str(word) for word in words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SECONDS, check=False,
            env={**os.environ, "LC_ALL": "C"}, **more,
        )  # type: ignore[call-overload]  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{what}: {error}") from error
    if answer.returncode != 0:
        raise EnvironmentProblem(f"{what} failed: " + " / ".join(answer.stdout.strip().splitlines()[-4:]))
    return str(answer.stdout)


def _apt(cache: Path, *words: str) -> str:
    """apt-get install of all packages as for an empty system, with `words` in addition."""
    (cache / "partial").mkdir(parents=True, exist_ok=True)
    status = cache / "status"
    status.touch()
    options = [f"Dir::State::status={status}", f"Dir::Cache::archives={cache}", "APT::Sandbox::User=root",
               "APT::Install-Recommends=false", "APT::Keep-Downloaded-Packages=true", "Acquire::Retries=2"]  # fmt: skip
    chosen = [part for option in options for part in ("-o", option)]
    return _run("apt-get", "-q", "-y", *chosen, *words, "install", *PACKAGES, what="resolving the guest's packages")


def image(state: Path = STATE) -> Image:
    """The image for the packages that apt knows now, built if it is not there. Raises EnvironmentProblem."""
    for tool in ("apt-get", "dpkg-deb", "depmod", "modprobe", "readelf", "lz4"):
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin") is None:
            raise EnvironmentProblem(f"{tool} is missing", hint="./bootstrap installs it")
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = state / "packages"
        plan = [line.split(" (")[0] + " " + line.split("(")[1].split()[0]
                for line in _apt(cache, "--simulate").splitlines() if line.startswith("Inst ")]  # fmt: skip
        inside = b"".join((HERE / name).read_bytes() for name in ("image.py", "init", "agent.py"))
        name = hashlib.sha256("\n".join(sorted(plan)).encode() + inside).hexdigest()[:16]
        done = state / name
        if not done.exists():
            _apt(cache, "--download-only")
            wanted = {line.split()[1] for line in plan}
            with tempfile.TemporaryDirectory(prefix=".image-", dir=state) as folder:
                work = Path(folder)
                _build([deb for deb in cache.glob("*.deb") if deb.name.split("_")[0] in wanted], work)
                for old in state.glob("[0-9a-f]" * 16):
                    shutil.rmtree(old)
                (work / "out").chmod(0o755)
                (work / "out").rename(done)
        return Image(done / "kernel", done / "initramfs", (done / "version").read_text())


def _newest(debs: list[Path]) -> list[Path]:
    """One package of each name: a cache may hold older versions too."""
    newest: dict[str, Path] = {}
    for deb in sorted(debs, key=lambda path: path.stat().st_mtime):
        newest[deb.name.split("_")[0]] = deb
    return sorted(newest.values())


def _build(debs: list[Path], work: Path) -> None:
    """From packages to `work`/out/{kernel,initramfs,version}."""
    source, root, out = work / "all", work / "root", work / "out"
    for folder in (source, root, out):
        folder.mkdir()
    for deb in _newest(debs):
        _run("dpkg-deb", "-x", deb, source, what=f"unpacking {deb.name}")
    modules = next((source / base for base in ("lib/modules", "usr/lib/modules") if (source / base).is_dir()), None)
    if modules is None:
        raise EnvironmentProblem("the kernel's package holds no modules")
    version = next(modules.iterdir()).name
    _copy_programs(source, root)
    _copy_modules(source, modules / version, version, root)
    shutil.copy(HERE / "init", root / "init")
    shutil.copy(HERE / "agent.py", root / "agent.py")
    (root / "init").chmod(0o755)
    _small_files(source, root)
    with open(work / "archive", "wb") as archive:
        archive.writelines(_cpio(root))
    _run("lz4", "-l", "-9", "-q", "-f", work / "archive", out / "initramfs", what="packing the initramfs")
    (out / "kernel").write_bytes(_unpacked(next((source / "boot").glob("vmlinuz-*")).read_bytes()))
    (out / "version").write_text(version)


def _put(source: Path, root: Path, name: str) -> None:
    """Copy one file of the packages; a link together with what it leads to."""
    here, there = source / name, root / name
    if there.is_symlink() or there.exists():
        return
    there.parent.mkdir(parents=True, exist_ok=True)
    if here.is_symlink():
        leads = os.readlink(here)
        there.symlink_to(leads)
        _put(source, root, os.path.normpath(leads.lstrip("/") if leads[0] == "/" else f"{Path(name).parent}/{leads}"))
    elif here.is_file():
        shutil.copy(here, there)


def _copy_programs(source: Path, root: Path) -> None:
    """The wanted programs, Python, and every library that any of them needs."""
    for folder, _, files in os.walk(source):
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), source)
            python = re.match(r"usr/lib/python3[^/]*/", name) and not NO_PYTHON.search(name)
            if python or (PROGRAMS.fullmatch(file) and not name.startswith("usr/share/")):
                _put(source, root, name)
    seen: set[Path] = set()
    while fresh := {path for path in root.rglob("*") if path.is_file() and not path.is_symlink()} - seen:
        seen |= fresh
        elf = [path for path in fresh if path.stat().st_size and path.open("rb").read(4) == b"\x7fELF"]
        text = _run("readelf", "-d", *elf, what="reading what programs need") if elf else ""
        for needed in set(re.findall(r"\(NEEDED\).*\[(.*?)\]", text)):
            for place in LIBRARIES:
                if os.path.lexists(source / place / needed):
                    _put(source, root, f"{place}/{needed}")


def _copy_modules(source: Path, modules: Path, version: str, root: Path) -> None:
    """The wanted kernel modules with those they need. `modules` is their folder in the packages."""
    base = modules.parents[2]
    _run("depmod", "-b", base, version, what="finding the kernel modules")
    to = root / "lib/modules" / version
    to.mkdir(parents=True)
    for module in MODULES:
        needed = subprocess.run(
            ["modprobe", "-d", str(base), "-S", version, "--show-depends", module],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        for line in needed.stdout.splitlines():
            if line.startswith("insmod "):
                file = Path(line.split()[1])
                (to / file.name).write_bytes(file.read_bytes())
                with open(root / "load", "a") as order:
                    if file.name not in (root / "load").read_text().split():
                        order.write(f"{file.name}\n")
    if "rdma_rxe" not in (root / "load").read_text():
        raise EnvironmentProblem(f"kernel {version} has no rdma_rxe")


def _small_files(source: Path, root: Path) -> None:
    """Folders, the shell's commands, and the few files that programs look for."""
    for folder in ("proc", "sys", "dev", "run", "tmp", "root", "etc", "usr/bin", "usr/sbin", "bin", "sbin"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    have = {path.name for folder in ("bin", "sbin", "usr/bin", "usr/sbin") for path in (root / folder).iterdir()}
    busybox = next(path for path in root.rglob("busybox") if not path.is_symlink())
    for applet in _run(busybox, "--list", what="asking busybox for its commands").split():
        if applet not in have:
            (root / "bin" / applet).symlink_to("/" + str(busybox.relative_to(root)))
    for name, text in {
        "passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n", "hosts": "127.0.0.1 localhost\n",
        "nsswitch.conf": "hosts: files\n", "ld.so.conf": "/lib/x86_64-linux-gnu\n/usr/lib/x86_64-linux-gnu\n",
    }.items():  # fmt: skip
        (root / "etc" / name).write_text(text)


def _cpio(root: Path) -> Iterator[bytes]:
    """The folder as an archive in the newc format (kernel: Documentation/driver-api/early-userspace/buffer-format)."""

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
        path = name.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)

    for path in sorted(root.rglob("*")):
        name, mode = str(path.relative_to(root)), path.lstat().st_mode
        if path.is_symlink():
            yield entry(name, mode, os.readlink(path).encode())
        else:
            yield entry(name, mode, path.read_bytes() if path.is_file() else b"")
    yield entry("dev/console", 0o020600, device=(5, 1))
    yield entry("dev/null", 0o020666, device=(1, 3))
    yield entry("TRAILER!!!", 0)


def _unpacked(kernel: bytes) -> bytes:
    """The ELF file inside a bzImage, which QEMU starts by its PVH note; the bzImage if it is packed otherwise."""
    at = kernel.find(b"\xfd7zXZ\0")
    while at >= 0:
        try:
            inner = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(kernel[at:])
        except lzma.LZMAError:
            inner = b""
        if inner.startswith(b"\x7fELF"):
            return inner
        at = kernel.find(b"\xfd7zXZ\0", at + 1)
    return kernel


if __name__ == "__main__":
    print(*image(), sep="\n")
