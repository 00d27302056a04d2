"""What every room of the testbed shares: errors by blame (`errors`) and companion IPv6 addresses (`ip6`).

May import: nothing.
"""
