"""Tests of the wire formats, byte by byte against captures of Linux rxe."""
