"""The objects that a program owns on a NIC: protection domains, regions, queues, queue pairs, and their numbers.

What lives here: the device (`adapter`), a program's opening of it (`opening`, `user_context`), the objects that it owns
(`user_object`, `regions`, `completion`, `address_handle`, `user_queue_pair`), the memory of other processes, limits and
checks, and the dump and restore of all of it (`checkpoint`, `image`). How a program reaches these objects (commands,
shared memory, FIFOs) is the layer above, which hands its queues in through the protocols of `shared`; what the device
asks of the machine around it is `host`.

May import: `softroce_ext.transport`, `softroce_ext.wire`.
"""
