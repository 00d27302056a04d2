"""The protocol: RC, UC, UD and MigrOS as a sans-IO core.

Frames, time, memory and queues are handed in (`interfaces`); frames to send are pulled out of `engine.Engine`, and it
says when it next wants to be called. Everything that a connection remembers is in one flat `context.QpContext`, so a
dump is a copy. Nothing here uses a socket, a clock, a random number or a thread.

May import: `softroce_ext.wire`.
"""
