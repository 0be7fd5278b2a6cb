"""HTTP clients for every request to another host: downloads, posts, the guard against private addresses.

Called by everything that talks to another host. May import `model` and `errors` alone.
"""
