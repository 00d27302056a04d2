"""The kernel's uverbs ABI as a process plays it: commands, shared queues, FIFOs, and the sysfs picture.

The layouts are those of the kernel headers rdma/ib_user_verbs.h and rdma/rdma_user_rxe.h; the program's half of the
channel is `native/bridge/`.

May import: `softroce_ext.device`, `softroce_ext.transport`.
"""
