"""The OpenFlow controller: knows the fabric, installs shortest paths, answers ARP, moves an address to another host.

What lives here: `fabric` (switches, ports and attachments as plain data), `routes` (which flows, in which order:
pure, imports no controller and does no input or output), `first_paths` (when the first ones go in), `framework` (Ryu,
or its fork os-ken, whichever is installed), `application` (the one thin module that runs on it), `northbound` (the
local socket through which the harness asks), `__main__` (the process), and on the harness's side `process` (start and
stop) and `client` (the calls). Only `framework`, `application` and `__main__` import Ryu or os-ken, and only the
controller's own process imports these three; everything else may be imported from anywhere.

May import: `testbed.base`, `testbed.cleanup`.
"""
