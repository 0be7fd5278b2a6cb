"""How FLORA speaks: signatures, wire messages, the API client."""
