"""A running lab: its hosts, the applications on them, and what a run holds together.

What lives here: hosts driven over SSH by their agents (`hosts`), applications from start to verdict (`applications`),
the numbers that programs print (`output`), the NICs that run on this machine (`nics`), and the session that is handed
to whoever acts on a lab (`session`).

May import: `softroce_ext.control`, `testbed.base`, `testbed.cleanup`, `testbed.record`, `testbed.topology`,
`testbed.controller`, `testbed.network`, `testbed.agent`.
"""
