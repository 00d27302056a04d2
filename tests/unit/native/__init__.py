"""Tests of the compiled parts and their build."""
