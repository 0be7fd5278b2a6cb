"""`flora-receiver demo`: eight runs from an emulated FLORA to files on this machine.

Called by `cli.app`; may import everything below `cli`, because it builds an emulator and a service.
"""
