"""The OpenFlow controller: knows the fabric, installs shortest paths, answers ARP, moves an address to another host.

What lives here: `fabric` (switches, ports and attachments as plain data), `routes` (which flows, in which order:
pure, imports no controller and does no input or output), `first_paths` (when the initial flows are installed),
`framework` (Ryu or its fork os-ken, whichever is installed), `application` (the thin layer that runs on it), `openflow`
(the messages of a change), `arp` and `discovery` (questions for a MAC and their answers), `datapath` (Open vSwitch's
flow cache), `northbound` (the local socket through which the testbed sends requests), `__main__` (the process), and on
the testbed's side `process` (start and stop) and `client` (the calls). Only `framework`, `application`, `openflow` and
`__main__` use Ryu or os-ken, and only the controller's process imports these four; everything else may be imported from
anywhere.

May import: `testbed.base`, `testbed.cleanup`.
"""
