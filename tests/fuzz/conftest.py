"""The simulated world and the in-process NIC are shared with tests/simulation and tests/unit/uverbs."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("simulation", "unit/uverbs"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
