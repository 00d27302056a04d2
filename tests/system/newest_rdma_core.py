"""The newest rdma-core that Debian has, unpacked into a root of its own, so that its programs run on our NIC.

Nothing is installed: the packages lie below the testbed's state folder, fetched once, and a program is started by
chroot in a mount namespace of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from testbed.checkpoint.install_criu import archives, fetch

ROOT = Path("/var/lib/migros-testbed/rdma-core-newest")
PACKAGES = ("ibverbs-utils", "ibverbs-providers", "perftest", "rdmacm-utils", "coreutils", "dash")
SUITE = "sid"
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
_ENTER = (
    'root=$0; for d in proc dev run var/lib/migros-testbed; do mount --rbind /$d "$root/$d" || exit 125; done; '
    'exec chroot "$root" "$@"'
)


def install() -> Path:
    """The root; made when it is not there. Raises EnvironmentProblem when Debian cannot be reached."""
    if (ROOT / "complete").exists():
        return ROOT
    ROOT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rdma-core-", dir=ROOT.parent) as folder:
        work = Path(folder)
        unpacked = work / "root"
        for name, target in _LINKS.items():
            (unpacked / target).mkdir(parents=True)
            (unpacked / name).symlink_to(target)
        for package in fetch(work / "apt", archives()[0], SUITE, PACKAGES):
            # Packages with a plain /lib go through the links: tar keeps them when it unpacks into the directory.
            tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True)
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", str(unpacked)], input=tar.stdout, check=True)
        for name in ("proc", "dev", "run", "tmp", "var/lib/migros-testbed"):
            (unpacked / name).mkdir(parents=True, exist_ok=True)
        (unpacked / "complete").touch()
        shutil.rmtree(ROOT, ignore_errors=True)
        unpacked.rename(ROOT)
    return ROOT


def command(root: Path, *words: str) -> list[str]:
    """A command line that runs a program of the root with the present network and NIC."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, str(root), *words]


def release(root: Path) -> str:
    """The release of libibverbs in the root, such as `62.0`."""
    (library,) = (path for path in root.glob("usr/lib/*/libibverbs.so.1.*"))
    return library.name.removeprefix("libibverbs.so.1.").partition(".")[2]
