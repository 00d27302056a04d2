"""A RoCEv2 NIC as a process: wire, transport with MigrOS, device, the kernel's verbs interface, port.

`python -m softroce_ext` starts one. Rooms, lowest first: `wire`, `transport`, `device`, `uverbs`, `cm`, `port`,
`trace`, `control` and `process`, which joins them; `native` has the C parts and `simulation` the core in virtual time.
The first lines of each say what lives there and what it may import; `tests/unit/test_layers.py` checks that. Nothing
here imports the testbed.
"""
