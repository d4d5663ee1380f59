"""What a critic is for, measured at a small scale: selection, guidance, repair and weights by region. See `__main__.py`."""
