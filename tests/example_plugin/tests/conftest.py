"""The kit's fixtures."""

pytest_plugins = ["receiver.testing.fixtures"]
