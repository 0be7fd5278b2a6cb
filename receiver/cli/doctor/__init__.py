"""`flora-receiver doctor`: checks a set-up from its settings to its public URL.

Every finding names a likely cause and a fix. Called by `cli.app`; `dev` uses `probe.py` too.
"""
