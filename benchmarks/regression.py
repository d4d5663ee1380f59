"""Linear least squares with standard errors."""

import numpy as np


def fit(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of values float[N, V] on columns float[N, K] and a constant.

    Returns:
      the coefficients of the columns and their standard errors, both [K, V]; and the standard deviation of the values around
      the fit [V]. A column of zeros has the coefficient 0. With no more rows than coefficients the last two are NaN.
    """
    design = np.column_stack([np.ones(len(columns)), columns])
    found, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    free = len(values) - rank
    deviation = np.sqrt(((values - design @ found) ** 2).sum(0) / free) if free else np.full(values.shape[1], np.nan)
    errors = np.outer(np.sqrt(np.diag(np.linalg.pinv(design.T @ design))), deviation)
    return found[1:], errors[1:], deviation
