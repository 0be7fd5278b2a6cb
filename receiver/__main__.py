"""`python -m receiver` is the command `flora-receiver`."""

from receiver.cli import main

main()
