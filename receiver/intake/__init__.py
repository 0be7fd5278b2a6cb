"""The only way into the ledger, for callbacks and for every other report on a run.

Callbacks are verified and parsed here. What arrives during a commit shares the next one.

Called by `web` (callbacks) and by `workers` (reads, starts, sweeps). May import `store`, `flora`,
`decide` and what is below them.
"""
