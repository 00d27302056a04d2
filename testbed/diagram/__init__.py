"""Sequence diagrams of the behaviour of queue pairs, drawn from their traces.

What lives here: the reader of trace files (`trace`), the layout of a diagram (`layout`) with its broken time axis
(`axis`), and the picture drawn from it (`picture`).

May import: `testbed.base`, `testbed.view`.
"""
