"""The only way into the ledger: callbacks are verified, parsed and committed here, and so is every other report on a run.

Called by `web` (callbacks) and by `workers` (reads, starts, sweeps). May import `store`, `flora`, `decide` and what is
below them.
"""
