"""Scenes of the protocol core in the simulator, traffic that checks itself, and the captures of Linux rxe."""
