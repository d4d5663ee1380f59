"""Scores pictures by the million into parquet files. `python -m rahf.score` is __main__.py, which says how to use it.

parts.py     a part of the output: what a worker process reads, and what it writes; imports no JAX
workers.py   the worker processes
job.py       the loop over the pictures, and the summary at its end
beam.py      the same on Apache Beam
"""
