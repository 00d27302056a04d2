"""Tests; a package so that `python -m tests.interop` finds it."""
