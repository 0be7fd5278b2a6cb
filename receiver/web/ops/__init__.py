"""The operations listener: the API, metrics and health, behind a token.

Built by `service`. May import `workers`, `intake`, `client` (whose messages it fills) and what is
below them.
"""
