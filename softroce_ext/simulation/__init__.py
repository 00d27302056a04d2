"""The protocol core in virtual time: seeded networks, random schedules, and the invariants that they must keep.

What lives here: `hosts` with memory, keys and queues, the impaired network between them (`link`), the virtual clock
(`world`), one random schedule generated from a seed and checked (`schedule`), and the command that runs many of them
(`python -m softroce_ext.simulation`). The code under test is `softroce_ext.transport`, as in the NIC. Nothing here
opens a socket or reads a clock, except that the command measures its own speed.

May import: `softroce_ext.transport`, `softroce_ext.wire`, `softroce_ext.port`.
"""
