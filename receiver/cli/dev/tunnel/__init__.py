"""Tunnels: public HTTPS URLs that lead to a receiver on a laptop. Used by `dev` only.

Each provider is a small module behind the protocol in `provider.py`. `diagnosis.py` finds what is
at fault when callbacks do not arrive; `supervisor.py` opens a tunnel, checks it and reopens it.
"""
