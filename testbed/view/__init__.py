"""What a person sees of a run: the live view, the report, the plots, the tables of a NIC.

What lives here: `live`, `report`, `plots`, `nic_tables`, and how numbers are written in all of them (`text`).

May import: `softroce_ext.transport`, `testbed.record`.
"""
