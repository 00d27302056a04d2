"""Tests of the verbs commands and of the shared queues, with a program in this process."""
