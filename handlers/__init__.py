"""The handlers that ship with flora-receiver, each in a room of its own; `payload`, `naming` and `waiting` serve several.

Of the receiver they import `receiver.handler` only.
"""
