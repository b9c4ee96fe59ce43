"""Tokens as colors: their first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np

# Where the three principal components go in RGB: the first to lightness, the second to yellow-blue
# (which most color-blind readers see), and only the weakest to red-green. Rows are orthonormal.
COMPONENTS_TO_RGB = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])


def pca_colors(tokens: np.ndarray, true_tokens: np.ndarray) -> np.ndarray:
    """Tokens [..., W] as RGB in 0..1 [..., 3], by three principal components of the true tokens.

    Centre, basis and scale are those of the true tokens, so that equal colors mean equal tokens
    (as far as three components tell) whatever the row.
    """
    true = np.asarray(true_tokens, dtype=np.float64).reshape(-1, true_tokens.shape[-1])
    centre = true.mean(axis=0)
    basis = np.linalg.svd(true - centre, full_matrices=False)[2][:3]  # [<= 3, W]
    # The decomposition leaves the signs open; fix them, or colors could flip between machines.
    largest = np.abs(basis).argmax(axis=1, keepdims=True)
    basis = basis * np.sign(np.take_along_axis(basis, largest, axis=1))
    # A few extreme tokens may clip: scaled to the maximum, everything else would look grey.
    scale = np.maximum(np.percentile(np.abs((true - centre) @ basis.T), 96, axis=0), 1e-12)
    components = ((tokens - centre) @ basis.T) / scale  # [..., <= 3]
    return np.clip(0.5 + 0.62 * components @ COMPONENTS_TO_RGB[: len(basis)], 0, 1)
