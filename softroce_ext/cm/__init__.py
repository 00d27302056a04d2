"""rdma_cm: the kernel's connection manager as librdmacm knows it (rdma/rdma_user_cm.h) and as peers do (IBA ch. 12).

`messages` and `connection` are sans-IO: bytes and time in, bytes, events and timers out. `ids` has what a program sees
as rdma_cm_id; `manager` brings ids, connections and QP1 together; `ucma` is the command ABI; `server` the files that
stand for opens of /dev/infiniband/rdma_cm. May import `device`, `transport` and `wire`; only `server` imports `uverbs`.
"""
