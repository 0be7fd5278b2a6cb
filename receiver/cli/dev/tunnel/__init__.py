"""Ways to a public HTTPS address for a receiver on a laptop, and how it is told whether such a way is open.

A provider is one small module behind the protocol in `ways.py`; `probe.py` sends canaries, `judging.py` says who is at
fault, `keeping.py` opens, watches and opens again. Called by the command line alone.
"""
