"""What a NIC writes down for its users: the events of queue pairs, packets in words, commands of programs.

What lives here: the queue pair trace (`queue_pairs`, JSON lines described in docs/trace.md), the names of a packet's
fields (`packets`), and the command trace (`commands`). A trace observes; it never changes what it observes.

May import: `softroce_ext.transport`, `softroce_ext.wire`.
"""
