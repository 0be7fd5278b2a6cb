"""The loops of the service: they read and start runs, call handlers, delete old rows.

Each has `tick`, which does the work that is due, and `run`, which waits between two ticks. Built
and run by `service`; `web` uses the starter. May import `plugins`, `intake` and what is below them.
"""
