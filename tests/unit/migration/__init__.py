"""Tests of the migration's phases and schedule, against fake agents."""
