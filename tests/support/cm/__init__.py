"""Connection managers to test: one alone, several on one wire, and the captured management datagrams."""
