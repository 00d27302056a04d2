"""Tests of topology files; `errors/` holds wrong ones, each with the text that it must cause."""
