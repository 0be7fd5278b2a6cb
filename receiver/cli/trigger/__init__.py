"""`flora-receiver trigger`: sends signed callbacks as FLORA does, valid and invalid ones.

Called by `cli.app` and `cli.demo`; may import `config`, `flora.signature` and `net`.
"""
