"""The HTTP edges of the service: status codes, headers and JSON live here and nowhere further in."""
