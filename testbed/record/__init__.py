"""The results of a run: its folder, its events, its summary and the statistics over several runs.

What lives here: the folder of a run (`folder`), the table of events (`events`), the summary and its JSON schema
(`summary`), medians and intervals (`stats`), and the versions of everything involved (`versions`).

May import: nothing.
"""
