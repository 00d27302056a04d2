"""Tests that need root: NICs in namespaces, whole runs with Mininet and CRIU, and the programs that run there."""
