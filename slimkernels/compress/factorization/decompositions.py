"""Low-rank decompositions of a weight: pure functions from a tensor to factors, computed in float64 and cast back.

`truncated_svd` and `svd_conv` are the truncated SVD, `tai` the separable kx1, 1xk pair of Tai et al. (arXiv
1511.06067), `tucker2` the channel-mode Tucker decomposition of Kim et al. (arXiv 1511.06530).
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` approximation ``U @ V`` of a matrix, the singular values split evenly.

    Its squared Frobenius error is the sum of the squares of the dropped singular values (Eckart & Young, 1936).

    Args:
        weight: ``(out, in)``, floating point.
        rank: in [1, min(out, in)].

    Returns:
        ``U (out, rank)`` and ``V (rank, in)``, detached, in the weight's dtype.

    Raises:
        ValueError: not a finite matrix, or rank out of range. TypeError: not floating point.
    """
    matrix = float64("truncated_svd", weight, 2)
    u, v = _split_svd("truncated_svd", matrix, rank)
    return u.to(weight.dtype), v.to(weight.dtype)


def tai(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Separable pair whose composition is the best approximation of a convolution weight of that form.

    The SVD of the ``(C * kh, kw * N)`` matrix of W gives the global optimum (Tai et al., arXiv 1511.06067, theorem
    1); singular values are split evenly.

    Args:
        weight: ``(N, C, kh, kw)``, floating point.
        rank: in [1, min(C * kh, N * kw)].

    Returns:
        ``vertical (rank, C, kh, 1)``, applied first, and ``horizontal (N, rank, 1, kw)``, in the weight's dtype.

    Raises:
        ValueError: not a finite 4-D weight, or rank out of range. TypeError: not floating point.
    """
    matrix = tai_matrix(float64("tai", weight, 4))
    n, c, kh, kw = weight.shape
    left, right = _split_svd("tai", matrix, rank)
    vertical = left.t().reshape(rank, c, kh, 1)
    horizontal = right.reshape(rank, kw, n).permute(2, 0, 1).reshape(n, rank, 1, kw)
    return vertical.to(weight.dtype).contiguous(), horizontal.to(weight.dtype).contiguous()


def svd_conv(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of a convolution weight as a matrix ``(N, C * kh * kw)``: kh x kw to ``rank`` channels, then 1x1.

    Args:
        weight: ``(N, C, kh, kw)``, floating point.
        rank: in [1, min(N, C * kh * kw)].

    Returns:
        ``(rank, C, kh, kw)``, applied first, and ``(N, rank, 1, 1)``, in the weight's dtype.

    Raises:
        ValueError: not a finite 4-D weight, or rank out of range. TypeError: not floating point.
    """
    matrix = float64("svd_conv", weight, 4).flatten(1)
    n, c, kh, kw = weight.shape
    u, v = _split_svd("svd_conv", matrix, rank)
    return v.reshape(rank, c, kh, kw).to(weight.dtype), u.reshape(n, rank, 1, 1).to(weight.dtype)


def tucker2(weight: Tensor, rank_out: int, rank_in: int, *, sweeps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Channel-mode Tucker decomposition of a convolution weight: 1x1, kh x kw, 1x1 (Kim et al., arXiv 1511.06530).

    HOSVD (De Lathauwer et al., 2000a), then at most ``sweeps`` sweeps of higher-order orthogonal iteration (2000b),
    each of which can only lower the error. The first factor has orthonormal rows, the last orthonormal columns.

    Args:
        weight: ``(N, C, kh, kw)``, floating point.
        rank_out: in [1, min(N, rank_in * kh * kw)].
        rank_in: in [1, min(C, rank_out * kh * kw)].
        sweeps: 0 gives the plain HOSVD.

    Returns:
        ``(rank_in, C, 1, 1)``, ``(rank_out, rank_in, kh, kw)``, ``(N, rank_out, 1, 1)``, in order of application, in
        the weight's dtype.

    Raises:
        ValueError: not a finite 4-D weight, or a rank out of range. TypeError: not floating point.
    """
    w = float64("tucker2", weight, 4)
    n, c, kh, kw = w.shape
    for name, value, size, other in (("rank_out", rank_out, n, rank_in), ("rank_in", rank_in, c, rank_out)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"tucker2: expected {name} to be an int, got {value!r}")
        limit = min(size, max(other, 1) * kh * kw)
        if not 1 <= value <= limit:
            raise ValueError(f"tucker2: expected {name} in [1, {limit}] for a weight {tuple(w.shape)}, got {value}")
    u_out = _left_singular_vectors(unfold_out(w), rank_out)
    u_in = _left_singular_vectors(unfold_in(w), rank_in)
    kept = -1.0
    for _ in range(sweeps):
        u_out = _left_singular_vectors(unfold_out(torch.einsum("ncrs,ci->nirs", w, u_in)), rank_out)
        projected = torch.einsum("ncrs,no->ocrs", w, u_out)
        u_in = _left_singular_vectors(unfold_in(projected), rank_in)
        norm = float(torch.einsum("ocrs,ci->oirs", projected, u_in).square().sum())
        if norm <= kept * (1 + 1e-9):
            break
        kept = norm
    core = torch.einsum("ncrs,no,ci->oirs", w, u_out, u_in)
    factors = u_in.t().reshape(rank_in, c, 1, 1), core, u_out.reshape(n, rank_out, 1, 1)
    # For mypy: tuples have the right length, which their types do not say.
    return tuple(f.to(weight.dtype).contiguous() for f in factors)  # type: ignore[return-value]


def float64(op: str, weight: Tensor, dims: int) -> Tensor:
    """The weight, detached, in float64; raises unless it is floating point, finite, ``dims``-dimensional, not empty."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: expected a floating-point weight, got {got}")
    if weight.dim() != dims or weight.numel() == 0:
        raise ValueError(f"{op}: expected a {dims}-D weight of positive sizes, got {tuple(weight.shape)}")
    out = weight.detach().double()
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{op}: expected a finite weight, got NaN or infinity")
    return out


def _split_svd(op: str, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    limit = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{op}: expected rank to be an int, got {rank!r}")
    if not 1 <= rank <= limit:
        raise ValueError(f"{op}: expected rank in [1, {limit}] for a {tuple(matrix.shape)} matrix, got {rank}")
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()


def tai_matrix(weight: Tensor) -> Tensor:
    """``(C * kh, kw * N)``."""
    n, c, kh, kw = weight.shape
    return weight.permute(1, 2, 3, 0).reshape(c * kh, kw * n)


def unfold_out(weight: Tensor) -> Tensor:
    """``(N, C * kh * kw)``, the output-channel unfolding."""
    return weight.flatten(1)


def unfold_in(weight: Tensor) -> Tensor:
    """``(C, N * kh * kw)``, the input-channel unfolding."""
    return weight.transpose(0, 1).flatten(1)


def _left_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """The leading ``count`` left singular vectors; those of R^T where A^T = QR, 9x smaller for a 3x3 convolution."""
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.t(), mode="r").R.t()
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :count]
