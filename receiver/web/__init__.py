"""The HTTP listeners: the public one here, the operations API in `ops`. HTTP statuses stay in here.

Built by `service`. May import `workers`, `intake`, `client` and what is below them.
"""
