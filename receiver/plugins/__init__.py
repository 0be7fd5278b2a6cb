"""Finds, builds and calls handlers: entry points, plain functions, attempts, their threads and progress.

Called by `workers`, `service` and `cli`. May import `handler`, the contract, and the layers below;
never `handlers`.
"""
