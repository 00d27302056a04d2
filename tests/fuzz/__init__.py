"""Fuzzing of every input that a stranger controls; `python -m tests.fuzz` runs it for longer."""
