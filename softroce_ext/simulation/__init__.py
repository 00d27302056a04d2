"""The protocol core in a world of virtual time: seeded networks, random schedules, and the invariants they must keep.

`hosts` have memory, keys and queues, `link` is a bad network, `world` a clock; `schedule` makes and checks one random
schedule from a seed; `python -m softroce_ext.simulation` runs many. The code under test is `softroce_ext.transport`, as
in the NIC. Nothing here opens a socket or reads a clock (only the command measures its own speed).

May import: `softroce_ext.transport`, `softroce_ext.wire`, `softroce_ext.port`.
"""
