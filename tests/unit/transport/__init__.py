"""Tests of the protocol core, against captures of Linux rxe where there are any."""
