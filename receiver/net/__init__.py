"""HTTP clients for every way out of the process: the guard against private addresses, downloads, posts, certificates.

Called by everything that talks to another host. May import `model` and `errors` alone.
"""
