"""What several tests share and what is not a test: simulated scenes, NICs to test against, hostile programs' means."""
