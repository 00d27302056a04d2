"""Tests of routes, first paths and the northbound interface, without switches."""
