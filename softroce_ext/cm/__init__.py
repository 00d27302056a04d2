"""rdma_cm: the kernel's connection manager as librdmacm knows it (rdma/rdma_user_cm.h) and as peers do (IBA ch. 12).

`messages` and `connection` are sans-IO: bytes and time in, bytes, events and timers out. `ids` has what a program sees
as rdma_cm_id; `table` which connections there are, `addresses` the ways to their peers, `groups` multicast; `manager`
brings them and QP1 together, `incoming` takes what peers say there. `ucma` and `commands*` are the command ABI,
`checkpoint` and `records` the image, `server` the files that stand for opens of /dev/infiniband/rdma_cm. Only
`server` imports `uverbs`.

May import: `softroce_ext.device`, `softroce_ext.transport`, `softroce_ext.wire`, `softroce_ext.uverbs`.
"""
