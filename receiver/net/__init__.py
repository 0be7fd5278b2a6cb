"""HTTP to other hosts: downloads, posts, and the guard against private addresses.

It also holds the pure leaves that settings, store and commands share: what a credential may consist of,
the URL of a database, what no output may show, and who owns a file. May import `model` and `errors` alone.
"""
