"""The best approximation of a product of lower rank (Eckart-Young), without ever forming BA."""

from dataclasses import dataclass

import numpy as np

from loramux_shared.bundle.npy import Array


@dataclass(frozen=True)
class LowRank:
    """A and B of a lower rank, scale included, in float32."""

    a: Array
    """(rank, in)"""
    b: Array
    """(out, rank)"""
    error: float
    """Frobenius norm of the difference of the products over that of the original; 0 for a zero product."""


def best_approximation(a: Array, b: Array, scale: float, rank: int) -> LowRank:
    """Return the approximation of ``scale * B A`` by a product of that rank, at most.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of R_b R_aᵀ are those of BA, and R's are small. Both
    factors take the root of the singular values, so that neither over- nor underflows where the other does
    not. The sign of each component is that which makes the largest element of its row of A positive, so that
    the result does not depend on a convention of LAPACK.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(scale * (r_b @ r_a.T))
    rank_left = min(rank, len(values))
    root = np.sqrt(values[:rank_left])
    new_a = (vt[:rank_left] @ q_a.T) * root[:, None]
    new_b = (q_b @ u[:, :rank_left]) * root
    largest = new_a[np.arange(rank_left), np.abs(new_a).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    total = float(np.sum(values**2))
    lost = float(np.sum(values[rank_left:] ** 2))
    return LowRank(
        (new_a * signs[:, None]).astype(np.float32),
        (new_b * signs).astype(np.float32),
        float(np.sqrt(lost / total)) if total else 0.0,
    )
