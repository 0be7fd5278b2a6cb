"""FLORA's protocol: signatures, messages, the API client with its rate limit."""
