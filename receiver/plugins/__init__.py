"""Handlers are found, built and called here: entry points and plain functions, one attempt, its threads and progress.

Called by `workers` and `service`. May import `handler`, the contract, and what is below it; never `handlers`.
"""
