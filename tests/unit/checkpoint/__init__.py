"""Tests of the images, their transfer and the search for CRIU, without CRIU."""
