"""Bytes and headers: the format of a RoCEv2 frame, without its meaning.

What lives here: the opcode table (the single source of headers, lengths and flags), the header layouts of InfiniBand
Architecture volume 1 chapter 9, the ICRC, and functions that build and parse whole Ethernet frames. Nothing here does
input or output, or reads a clock or a random number.

May import: nothing.
"""
