"""Tests of the installation script."""
