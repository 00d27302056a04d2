"""What a queue pair remembers, as plain records that have one owner each.

`attributes` is what the program has set, `sender` and `receiver` are the two halves of the protocol, `movement` is its
migration, `statistics` are its counts; `queue_pair` composes them and turns them into plain data and back. A record
changes only itself, and knows `interfaces`, `verbs` and `wire`, never a queue pair or the engine.
"""
