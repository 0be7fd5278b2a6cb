"""`flora-receiver runs batch`: one run per row of a table.

Called by `cli.runs`; may import `client` and the shared modules of `cli`.
"""
