"""The harness: a topology file in, an emulated RDMA network with running programs and migrations, a report out.

What lives here: topology (schema and its errors), network and controller (Mininet, Open vSwitch, OpenFlow), hosts and
their agents (SSH), checkpoint and migration (CRIU, the phases, the rollback), results and report, and the command line.
It may import the network card's public parts (`softroce_ext.control`, `softroce_ext.native`), never its transport or
device internals; the card never imports the harness.
"""

__version__ = "0.1.0"
