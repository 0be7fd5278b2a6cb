"""The loops of the service: read runs, start runs, call handlers, delete what is old, elect who does it.

Each has `tick`, which does the work that is due, and `run`, which waits between two ticks. Built and run by `service`; `web`
uses the starter. May import `plugins`, `intake` and what is below them.
"""
