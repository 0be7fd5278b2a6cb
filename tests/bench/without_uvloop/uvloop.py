"""Stands before the real one on the path of a server that is measured on asyncio's own loop."""

raise ImportError("this server is measured without uvloop")
