"""Boots the guest with its network card on a tap interface, and drives the agent inside."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from testbed.base.errors import EnvironmentProblem
from tests.interop.ends import End, Program, Space
from tests.interop.guest.image import Image

MAC = "52:54:00:00:09:02"
_BOOT_SECONDS = 120.0
"""An emulated machine on a busy one may take its time."""
_WORDS = (
    "console=ttyS0 quiet loglevel=4 mitigations=off nokaslr tsc=reliable no_timer_check random.trust_cpu=on "
    "nowatchdog panic=-1 rcupdate.rcu_expedited=1 apparmor=0 audit=0 cryptomgr.notests"
)


class GuestProgram(Program):
    """A program in the guest."""

    def __init__(self, guest: Guest, number: int) -> None:
        super().__init__()
        self._guest = guest
        self._number = number

    def write(self, text: str) -> None:
        """To its standard input."""
        self._guest.tell(id=self._number, input=text)

    def kill(self) -> None:
        """End it by force, with everything that it started."""
        self._guest.tell(id=self._number, kill=int(signal.SIGKILL))


class Guest(End):
    """Debian's kernel with rdma_rxe as device rxe0 on eth0, which is the far side of the interface `tap` in `space`."""

    def __init__(self, image: Image, space: Space, tap: str, ip4: str, ip6: str, mtu: int = 1500) -> None:
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise EnvironmentProblem("qemu-system-x86_64 is missing", hint="./bootstrap installs it")
        self.name, self.ip4, self.ip6, self.mtu = "rxe", ip4, ip6, mtu
        self._folder = tempfile.TemporaryDirectory(prefix="migros-guest-")
        self._programs: dict[int, GuestProgram] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self.console = Path(self._folder.name) / "console"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self._folder.name}/agent")
        listener.listen(1)
        space.do("ip", "tuntap", "add", tap, "mode", "tap")
        space.do("sysctl", "-qw", f"net.ipv6.conf.{tap}.disable_ipv6=1")
        space.do("ip", "link", "set", tap, "mtu", "9000", "up")
        words = [
            qemu, "-M", "q35,usb=off,graphics=off,vmport=off,smbus=off,sata=off", "-smp", "1", "-m", "448",
            # Emulated even where there is /dev/kvm: inside another virtual machine that often does not work.
            "-accel", "tcg,tb-size=128", "-cpu", "max,-la57",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(image.kernel), "-initrd", str(image.initramfs),
            "-append", f"{_WORDS} rxe.mtu={mtu} rxe.ip4={ip4}/24 rxe.ip6={ip6}/64",
            "-serial", f"file:{self.console}",
            "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
            "-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no,vhost=off,vnet_hdr=off",
            "-device", f"virtio-net-pci,netdev=n0,mac={MAC},host_mtu=9000,romfile=,rx_queue_size=1024",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={self._folder.name}/agent",
            "-device", "virtserialport,chardev=agent,name=agent",
        ]  # fmt: skip
        self._qemu = subprocess.Popen(space.enter(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        listener.settimeout(20)
        try:
            self._socket, _ = listener.accept()
        except TimeoutError:
            raise EnvironmentProblem(f"the guest did not start: {self._last_words()}") from None
        finally:
            listener.close()
        threading.Thread(target=self._listen, daemon=True).start()
        deadline = time.monotonic() + _BOOT_SECONDS
        while not self._ready.wait(0.1):
            if self._qemu.poll() is not None or time.monotonic() > deadline:
                raise EnvironmentProblem(f"the guest did not boot: {self._last_words()}")

    def _last_words(self) -> str:
        """What QEMU and the kernel said last."""
        self._qemu.kill()
        said = self._qemu.communicate()[0]
        log = self.console.read_text(errors="replace") if self.console.exists() else ""
        return " / ".join((said + log).strip().splitlines()[-5:])

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                piece = self._socket.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece:
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "ready" in message:
                    self._ready.set()
                elif (program := self._programs.get(message["id"])) is None:
                    continue  # a late word about one that has ended must not end this thread
                elif "output" in message:
                    program.feed(message["output"])
                else:
                    self._programs.pop(message["id"]).feed(message["exit"])
        for program in list(self._programs.values()):
            program.feed("(the guest has gone)\n")
            program.feed(255)

    def tell(self, **message: object) -> None:
        """One message to the agent."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _send(self, **message: object) -> GuestProgram:
        self._count += 1
        program = self._programs[self._count] = GuestProgram(self, self._count)
        self.tell(id=self._count, **message)
        return program

    def start(self, *words: str) -> Program:
        """Start a program."""
        return self._send(start=list(words))

    def put(self, path: str, text: str) -> None:
        """Write a file inside. Raises EnvironmentProblem."""
        code, output = self._send(put=path, text=text).finish(20)
        if code != 0:
            raise EnvironmentProblem(f"guest: {path}: {output.strip()}")

    def read(self, path: str) -> str:
        """The text of a file there."""
        code, text = self.run("cat", path)
        return text if code == 0 else ""

    def listens_cm(self) -> bool:
        """As rdma(8) tells."""
        return "LISTEN" in self.run("rdma", "resource", "show", "cm_id")[1]

    def sysfs(self) -> str:
        """Linux's own."""
        return "/sys"

    def set_mtu(self, mtu: int) -> None:
        """Change the interface's MTU; rxe follows."""
        self.mtu = mtu
        self.run("ip", "link", "set", "eth0", "mtu", str(mtu))

    def close(self) -> None:
        """End QEMU."""
        self._qemu.kill()
        self._qemu.wait()
        if self._qemu.stdout is not None:
            self._qemu.stdout.close()
        self._socket.close()
        self._folder.cleanup()
