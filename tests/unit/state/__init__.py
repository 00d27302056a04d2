"""Tests of the state files from which `testbed clean` removes what a run has left."""
