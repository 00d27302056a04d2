"""Tests of the traces of queue pairs, and of the diagrams that are drawn from them."""
