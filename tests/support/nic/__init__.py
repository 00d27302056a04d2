"""A NIC to test against: its upper half within this process, or a whole one in namespaces of its own."""
