"""Tests of the plan, the shaping and the removal of a network, without Mininet."""
