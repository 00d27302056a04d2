"""The end of a restore, with a stand-in for CRIU."""

from __future__ import annotations

import signal
from pathlib import Path

from testbed.checkpoint.restore import Restore

LATE = 'sleep 0.3; cat "$2/inventory.img"'
"""As CRIU's command line has it: restore --images-dir IMAGES …"""


def test_a_criu_that_opens_its_first_image_after_the_abort_does_not_wait_for_it(tmp_path: Path) -> None:
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir()
    work.mkdir()
    restore = Restore(["sh", "-c", LATE], images, work)
    restore.abort(timeout=5.0)
    assert restore.process.returncode is not None
    assert restore.process.returncode != -signal.SIGKILL, "it had to be killed"
