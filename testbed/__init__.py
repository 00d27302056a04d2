"""The testbed: a topology file in, an emulated RDMA network with running programs and migrations, a report out.

Rooms, lowest first: `base`, `record`, `cleanup`, `topology`, `checkpoint`, `view`, `controller`, `agent`, `diagram`,
`network`, `lab`, `migration`, `run`, `measure`, `cli`. The first lines of each say what lives there and what it may
import; `tests/unit/test_layers.py` checks that. Of the NIC the testbed uses the management socket, the C parts and the
names of the verbs; the NIC never imports the testbed.
"""

__version__ = "0.1.0"
