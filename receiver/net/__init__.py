"""HTTP to other hosts: downloads, posts, and the guard against private addresses.

Called by everything that talks to another host. May import `model` and `errors` alone.
"""
