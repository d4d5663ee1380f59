"""Paper B's method at a small scale, on one machine: pictures, raters, reward and diffusion. See `__main__.py`."""
