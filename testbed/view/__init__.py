"""The presentation of a run: the live view, the report, the plots, the tables of a NIC.

What lives here: `live`, `report`, `plots`, `nic_tables`, and the number formats that all of them use (`text`).

May import: `softroce_ext.transport`, `testbed.record`.
"""
