"""Finds, builds and calls handlers: entry points, functions, attempts, threads and progress.

Called by `workers`, `service` and `cli`. May import `handler`, the contract, and the layers below;
never `handlers`.
"""
