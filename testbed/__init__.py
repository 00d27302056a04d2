"""The testbed: from a topology file it emulates an RDMA network, runs and migrates programs in it, and reports.

Packages, lowest first: `base`, `record`, `cleanup`, `topology`, `checkpoint`, `view`, `controller`, `agent`, `diagram`,
`network`, `lab`, `migration`, `run`, `measure`, `cli`. The docstring of each says what lives there and what it may
import; `tests/unit/test_layers.py` checks that. The testbed uses the NIC's management socket, its C parts, its names of
verbs and the sizes of its headers; the NIC never imports the testbed.
"""

__version__ = "0.2.0"
