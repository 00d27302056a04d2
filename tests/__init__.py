"""The tests, as a package: every import between their files is absolute, from `tests`."""
