"""`flora-receiver trigger`: send signed callbacks as FLORA does, good ones and bad ones. Called by `cli.app`."""
