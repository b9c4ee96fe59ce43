"""Distances between two sets of vectors [n, C] and [m, C]. Pure functions, float64 inside.

They compare distributions, not pairs: shuffling one set changes nothing. Their sizes depend on the number
of vectors, so a distance means something only beside one of as many real vectors from real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), >= 0.

    The squared 2-Wasserstein distance of the Gaussians with these moments (Dowson and Landau 1982; on
    Inception features it is the FID of Heusel et al., arXiv 1706.08500). Covariances divide by n - 1.

    Raises:
        ValueError: with fewer than two vectors on a side.
    """
    a, b = _checked(a, b, at_least=2)
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    rows_a, rows_b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    traces = rows_a.square().sum() + rows_b.square().sum()
    return max(0.0, float((mean_a - mean_b).square().sum() + traces - 2 * _root_trace(rows_a, rows_b)))


def mmd_from_distances(aa: Tensor, bb: Tensor, ab: Tensor, bandwidth_square: float) -> float:
    """Squared maximum mean discrepancy with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)), unbiased.

    From squared distances [n, n], [m, m], [n, m]. About 0 for equal distributions (it can be slightly
    negative), at most 2 (Gretton et al. 2012, equation 3; on CLIP features this is CMMD, arXiv 2401.09603).
    """
    inside = 0.0
    for square in (aa, bb):
        kernel = torch.exp(square / (-2 * bandwidth_square))
        inside += float((kernel.sum() - kernel.diagonal().sum()) / (len(square) * (len(square) - 1)))
    return inside - 2 * float(torch.exp(ab / (-2 * bandwidth_square)).mean())


def median_square(square: Tensor) -> float:
    """Median of the squared distances between different rows, [n, n]; 1 when all rows are equal."""
    rows, columns = torch.triu_indices(len(square), len(square), offset=1)
    return float(square[rows, columns].median()) or 1.0


def precision_recall_from_distances(rr: Tensor, gg: Tensor, rg: Tensor, *, k: int) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of generated vectors by k-nearest-neighbour balls.

    From squared distances: reference [n, n], generated [m, m], between them [n, m].

    Precision and recall: the share of one set inside the other's balls, in [0, 1] (Kynkaanniemi et al.,
    arXiv 1904.06991). Density (>= 0, 1 for equal distributions): how many reference balls hold a generated
    vector, over k. Coverage in [0, 1]: the share of reference balls that hold one (Naeem et al., arXiv
    2002.09797; k = 5 is theirs).
    """
    radius_r = rr.kthvalue(k + 1, dim=1).values  # the nearest is the vector itself
    radius_g = gg.kthvalue(k + 1, dim=1).values
    in_reference_ball = rg < radius_r[:, None]
    return {
        "precision": float(in_reference_ball.any(dim=0).double().mean()),
        "recall": float((rg < radius_g[None, :]).any(dim=1).double().mean()),
        "density": float(in_reference_ball.double().sum(dim=0).mean() / k),
        "coverage": float((rg.min(dim=1).values < radius_r).double().mean()),
    }


def wasserstein_per_channel(a: Tensor, b: Tensor) -> float:
    """The 1-Wasserstein distance of each channel's marginal, averaged over the channels, >= 0.

    In one dimension it is the area between the two distribution functions, here by quantiles: exact for
    sets of equal size.
    """
    a, b = _checked(a, b, at_least=1)
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    if len(a) == len(b):
        return float((a - b).abs().mean())
    edges = torch.cat(
        [torch.arange(1, len(a) + 1).double() / len(a), torch.arange(1, len(b)).double() / len(b)]
    )
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), edges.unique()])
    middle = (edges[1:] + edges[:-1]) / 2
    row_a = (middle * len(a)).long().clamp(max=len(a) - 1)
    row_b = (middle * len(b)).long().clamp(max=len(b) - 1)
    return float(((a[row_a] - b[row_b]).abs() * edges.diff()[:, None]).sum(dim=0).mean())


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, [n, m]; exactly zero on the diagonal when `b` is `a`."""
    square = (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)
    if b is a:
        square.fill_diagonal_(0.0)
    return square


def _root_trace(a: Tensor, b: Tensor) -> Tensor:
    """tr((a^T a b^T b)^(1/2)): the nuclear norm of a b^T, from the smaller of two Gram matrices."""
    if len(a) <= a.shape[1]:
        product = a @ b.T
        gram = product @ product.T
    else:
        covariance = a.T @ a
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:  # a channel that is constant or a sum of others
            factor = symmetric_root(covariance)
        gram = factor.T @ (b.T @ b) @ factor
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance [C, C]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _checked(a: Tensor, b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    for vectors in (a, b):
        if vectors.ndim != 2 or len(vectors) < at_least:
            raise ValueError(
                f"expected at least {at_least} vectors [n, C], found shape {list(vectors.shape)}"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected vectors of one width, found {a.shape[1]} and {b.shape[1]}")
    if a is b:
        return a.double(), a.double().clone()
    return a.double(), b.double()
