"""The papers' tables for any set of models on one split, with the uncertainty of a small test set.

rows.py          what a row may be: a workdir, a reward, somebody's predictions, an ensemble, a calibrated model
predictions.py   predictions.parquet: kept, checked, read in pieces
targets.py       targets.parquet: the annotators' answers, so that the tables need the dataset once
bootstrap.py     intervals, and which rows may be as good as the best
published.py     the results of the papers, and which dataset they are of
layout.py        the tables as Markdown, LaTeX and JSON
page.py          the page with plots and pictures
"""
