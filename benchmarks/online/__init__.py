"""The online methods beside reward-weighted fine-tuning, measured at a small scale. See `__main__.py`."""
