"""The handlers that ship with flora-receiver. The service loads each by its entry point.

Each has a module or folder of its own and knows no other. `payload`, `template`, `file_names` and
`dependencies` serve several. Of the receiver they import `receiver.handler` only.
"""
