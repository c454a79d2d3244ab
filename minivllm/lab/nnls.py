"""Least squares with non-negative unknowns: the active-set method of Lawson and Hanson (1974), chapter 23."""

import numpy as np


def nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |matrix x - target|; [rows, columns], [rows] -> [columns].

    Unknowns are set free one by one, the one first that gains most; those that would turn negative go back to 0.
    """
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(np.float64).tiny)  # a column of zeros stays at 0
    columns = matrix / scale
    tolerance = 1e-12 * np.linalg.norm(target)
    x, is_free = np.zeros(len(scale)), np.zeros(len(scale), dtype=bool)
    for _ in range(3 * len(scale)):  # enough in practice: each round lowers the residual
        gain = np.where(is_free, 0.0, columns.T @ (target - columns @ x))
        if gain.max() <= tolerance:
            break
        is_free[gain.argmax()] = True
        x = _settle(columns, target, x, is_free)
    return x / scale


def _settle(columns: np.ndarray, target: np.ndarray, x: np.ndarray, is_free: np.ndarray) -> np.ndarray:
    """Solve for the free unknowns, giving up (in `is_free`) those that reach 0 on the way there from `x`."""
    while is_free.any():
        wish = np.zeros_like(x)
        wish[is_free] = np.linalg.lstsq(columns[:, is_free], target, rcond=None)[0]
        falls = is_free & (wish <= 0)
        if not falls.any():
            return wish
        reach = np.full_like(x, np.inf)  # how far each may go towards its wish
        reach[falls] = x[falls] / np.maximum(x[falls] - wish[falls], np.finfo(np.float64).tiny)
        x = x + reach.min() * (wish - x)
        is_free &= reach > reach.min()
    return np.zeros_like(x)
