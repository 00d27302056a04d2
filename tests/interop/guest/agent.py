"""Runs inside the guest: starts programs for the host, over a virtio-serial port, one JSON object a line.

From the host: {"id": N, "start": [words], "environment": {}}, {"id": N, "input": text}, {"id": N, "kill": signal},
{"id": N, "put": path, "text": text}. To the host: {"ready": true}, {"id": N, "output": text}, {"id": N, "exit": code}.
Standard library only. It is process 1: if it ends, the guest ends.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading


def main(device: str) -> None:
    port = os.open(device, os.O_RDWR)
    lock = threading.Lock()
    running: dict[int, subprocess.Popen[bytes]] = {}

    def tell(**message: object) -> None:
        data = json.dumps(message).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(port, data) :]

    def follow(number: int, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            tell(id=number, output=chunk.decode(errors="replace"))
        code = process.wait()
        running.pop(number, None)
        tell(id=number, exit=code)

    def handle(message: dict) -> None:  # type: ignore[type-arg]
        number = message["id"]
        if "start" in message:
            process = subprocess.Popen(
                message["start"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, **message.get("environment", {})}, start_new_session=True,
            )  # fmt: skip
            running[number] = process
            threading.Thread(target=follow, args=(number, process), daemon=True).start()
        elif "put" in message:
            with open(message["put"], "w") as file:
                file.write(message["text"])
            tell(id=number, exit=0)
        elif (process := running.get(number)) is not None:
            with contextlib.suppress(OSError):  # it is just ending: `follow` will tell how
                if "kill" in message:
                    os.killpg(process.pid, message["kill"])
                else:
                    assert process.stdin is not None
                    process.stdin.write(message["input"].encode())
                    process.stdin.flush()

    tell(ready=True)
    rest = b""
    while True:
        rest += os.read(port, 65536)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            message = json.loads(line)
            try:
                handle(message)
            except OSError as error:
                tell(id=message["id"], output=f"{error}\n")
                tell(id=message["id"], exit=127)


main(sys.argv[1])
