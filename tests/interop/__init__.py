"""Interoperation: our NIC against Linux's own rdma_rxe (in a QEMU guest) and against itself, as a matrix of programs.

`guest/` builds and boots the guest, `lab.py` joins two ends by the `relay.py` that can impair the link, `programs.py`
is the table of what runs, `matrix.py` expands and runs it, `probe/` holds programs of our own that run at both ends.
Run it with `python -m tests.interop`. It imports `softroce_ext`, `testbed.base.errors` and `tests.support`; of
this package tests/system imports the lab, and from `probe/` how a program keeps a memory window's key, nothing else.
"""
