"""The critic as a web service; `__main__.py` is the command, server.py says what it answers."""
