"""A RoCEv2 NIC as a process: the wire, the RC transport with MigrOS, the device, the kernel's verbs interface, the port.

`python -m softroce_ext` starts one. Layers, each importing only those before it: `wire`, `transport`, `device`, `uverbs`,
then `port`, `nic` and `control` that join them. Nothing here imports the harness (`testbed`).
"""
