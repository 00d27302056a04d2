"""A running lab: its hosts and the applications on them.

What lives here: hosts driven by their agents (`hosts`) over SSH (`transport`), applications from start to verdict
(`applications`), the numbers that programs print (`output`), the NICs that run on this machine (`nics`), and the
session that holds all of a running lab (`session`).

May import: `softroce_ext.control`, `testbed.base`, `testbed.cleanup`, `testbed.record`, `testbed.topology`,
`testbed.controller`, `testbed.network`, `testbed.agent`.
"""
