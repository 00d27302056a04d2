"""Reliable connections: the roles of a queue pair that acknowledges, retransmits and migrates.

`connection` is what the roles share; `requester`, `completer`, `retry` and `timers` are the sending half, `responder`,
`answers` and `in_order` the receiving half, `movement` is MigrOS; `queue_pair` gives each packet to its role. A role
knows `connection` and the roles that it calls, never `queue_pair`, `uc`, `ud` or the engine.
"""
