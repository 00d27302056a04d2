"""Tests of the NIC's loop."""
