"""Tests of the device: memory, numbers, regions, the port's attributes and the checks of an image."""
