"""rdma_cm: the kernel's connection manager as librdmacm knows it (rdma/rdma_user_cm.h) and as peers do (IBA ch. 12).

`messages` and `connection` are sans-IO: bytes and time in, bytes, events and timers out. `ids` has what a program sees
as rdma_cm_id; `table` the connections, `addresses` the paths to their peers, `groups` multicast; `manager` joins them
and QP1, `incoming` takes the messages of peers. `interfaces` declares what they ask of the world around them. `ucma`
and `commands*` are the command ABI, `checkpoint` and `records` the image, `server` the files that stand for openings of
/dev/infiniband/rdma_cm, `routing` the host's routes and group memberships. Only `server` imports `uverbs`.

May import: `softroce_ext.device`, `softroce_ext.transport`, `softroce_ext.wire`, `softroce_ext.uverbs`.
"""
