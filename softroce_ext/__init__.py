"""A RoCEv2 NIC as a process: wire, RC transport with MigrOS, device, the kernel's verbs interface, port.

`python -m softroce_ext` starts one. Layers, each importing only those before it: `wire`, `transport`, `device`,
`uverbs`, then `port`, `loop`, `nic` and `control` that join them. Nothing here imports the harness (`testbed`).
"""
