"""The protocol: RC, UC, UD and MigrOS as a sans-IO core.

Frames, time, memory and queues are handed in (`interfaces`); frames to send are pulled out of `engine.Engine`, and it
says when it next wants to be called. What a queue pair remembers is in the records of `state`, so a dump is a copy;
each field is written by the record itself and at most one role. `queue_pair` is what the services have in common,
`rc`, `uc` and `ud` are the services, `services` is the table of them. Nothing here uses a socket, a clock, a random
number or a thread.

May import: `softroce_ext.wire`.
"""
