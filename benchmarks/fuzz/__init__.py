"""Broken, hostile and unusual inputs at every door; see __main__.py."""
