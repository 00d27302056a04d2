"""The guest: Debian's kernel and RDMA programs in an initramfs (`image.py`), run by QEMU (`boot.py`).

`init` and `agent.py` run inside. Nothing here knows what the guest is used for.
"""
