"""Bytes and headers: what a RoCEv2 frame looks like, and nothing about what it means.

Here live the opcode table (one table is the truth for headers, lengths and flags), the header layouts of the
InfiniBand Architecture volume 1 chapter 9, the ICRC, and the building and parsing of whole Ethernet frames. Nothing
here does input or output, or reads a clock or a random number.

May import: nothing.
"""
