"""The handlers that ship with flora-receiver. They import `receiver.handler` and `receiver.download` only."""
