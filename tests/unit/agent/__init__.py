"""Tests of the agent, which runs here as a child process."""
