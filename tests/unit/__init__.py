"""Tests of one package at a time, without root; each folder is named for what it tests."""
