"""Tests of the connection manager and of the commands of rdma_cm."""
