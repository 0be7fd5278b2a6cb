"""The way into the ledger: a callback is verified, parsed and committed here, and every other report on a run enters here.

Called by `web` (callbacks) and by `workers` (reads of runs). May import `store`, `flora`, `decide` and what is below them.
"""
