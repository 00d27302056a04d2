"""Tests of the protocol core in the simulator: moves, lossy links, schedules that catch deliberate faults."""
