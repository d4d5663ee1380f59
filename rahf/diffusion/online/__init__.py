"""Online alignment of Stable Diffusion: see __main__.py."""
