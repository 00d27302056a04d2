"""What every room of the testbed shares: errors by blame, and the IPv6 address beside each IPv4 address.

May import: nothing.
"""
