"""The archives that a release consists of."""
