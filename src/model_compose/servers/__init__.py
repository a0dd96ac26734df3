"""Servers: the faces of a Compose. What a file says of them is in server_options.py."""
