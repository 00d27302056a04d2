"""The protocol: RC (later UC and UD) and MigrOS as a sans-IO core.

Frames, time, memory and queues are handed in (`interfaces`); frames to send are pulled out of `engine.Engine`, and it
says when it next wants to be called. Everything that a connection remembers is in one flat `context.QpContext`, so a
dump is a copy. May import `softroce_ext.wire` and nothing else of ours; never a socket, a clock, a random number, a
thread.
"""
