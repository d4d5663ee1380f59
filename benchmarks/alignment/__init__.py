"""Paper B's method measured on one machine: pictures, raters, reward and diffusion in small. See `__main__.py`."""
