"""One run of a topology, from the checks of the machine to the summary.

What lives here: the stages of a run (`runner`), what signals do to it (`interrupts`), when migrations are due
(`schedule`), and the pcap files of a run (`captures`).

May import: `softroce_ext.native`, `testbed.base`, `testbed.cleanup`, `testbed.record`, `testbed.view`,
`testbed.topology`, `testbed.network`, `testbed.checkpoint`, `testbed.lab`, `testbed.migration`.
"""
