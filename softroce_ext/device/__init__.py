"""The objects that a program owns on a NIC: protection domains, regions, queues, queue pairs, and their numbers.

Here live allocation, keys, limits, access checks, the memory of other processes, and the dump and restore of all of it.
How a program reaches these objects (commands, shared memory, FIFOs) is the layer above, which hands its queues in
through the protocols of `shared`.

May import: `softroce_ext.transport`, `softroce_ext.wire`.
"""
