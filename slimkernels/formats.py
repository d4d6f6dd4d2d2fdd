"""Weight formats: block-sparse rows (BSR) of a convolution or linear weight, low-rank factors, and the training mask.

A weight ``(C_out, C_in, R, S)`` is stored as BSR of its tap-major, channel-innermost matrix
``w.permute(0, 2, 3, 1).reshape(C_out, R * S * C_in)``. Each tap is cut into ``G = ceil(C_in / block_in)`` column
groups, so a block never crosses taps: block column ``j = tap * G + c // block_in`` with ``tap = r * S + s``, block row
``i = o // block_out``. A linear weight ``(out, in)`` is the case R = S = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.tensors import Checked, is_capturing

LOW_RANK_KINDS = ("svd", "tai", "tucker2")


def weight_shape_4d(weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """``(C_out, C_in, R, S)`` of a linear ``(out, in)`` or convolution shape. Raises ValueError on any other rank."""
    shape = tuple(map(int, weight_shape))
    if len(shape) == 2:
        shape = (*shape, 1, 1)
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"BSRWeight: expected weight_shape (out, in) or (C_out, C_in, R, S) of positive sizes, "
            f"got {tuple(weight_shape)}"
        )
    return shape  # type: ignore[return-value]  # tuples have the right length, which their types do not say


def block_shape_2d(block_shape: Sequence[int], op: str = "BSRWeight") -> tuple[int, int]:
    """``(block_out, block_in)`` as ints. Raises ValueError, beginning with ``op``, unless it is two positive sizes."""
    if isinstance(block_shape, int):
        raise ValueError(
            f"{op}: expected block_shape (block_out, block_in) of positive sizes, "
            f"got the number {block_shape}; such as ({block_shape}, 1) or ({block_shape}, {block_shape})"
        )
    shape = tuple(map(int, block_shape))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{op}: expected block_shape (block_out, block_in) of positive sizes, got {tuple(block_shape)}"
        )
    return shape  # type: ignore[return-value]  # tuples have the right length, which their types do not say


def block_grid(weight_shape: Sequence[int], block_shape: Sequence[int]) -> tuple[int, int]:
    """``(block_rows, block_cols)``: ``ceil(C_out / block_out)`` and ``R * S * ceil(C_in / block_in)``."""
    c_out, c_in, r, s = weight_shape_4d(weight_shape)
    block_out, block_in = block_shape_2d(block_shape)
    return -(-c_out // block_out), r * s * -(-c_in // block_in)


def _to_blocks(weight: Tensor, block_shape: Sequence[int]) -> Tensor:
    """All blocks of a weight, zero-padded at ragged edges: ``(block_rows, block_cols, block_out, block_in)``."""
    c_out, c_in, r, s = weight_shape_4d(weight.shape)
    block_out, block_in = block_shape_2d(block_shape)
    rows, _ = block_grid(weight.shape, block_shape)
    groups = -(-c_in // block_in)
    w = weight.reshape(c_out, c_in, r * s)
    w = F.pad(w, (0, 0, 0, groups * block_in - c_in, 0, rows * block_out - c_out))
    w = w.reshape(rows, block_out, groups, block_in, r * s).permute(0, 4, 2, 1, 3)
    return w.reshape(rows, r * s * groups, block_out, block_in)


def _from_blocks(blocks: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]) -> Tensor:
    """Inverse of `_to_blocks`: the 4-D weight without its padding."""
    c_out, c_in, r, s = weight_shape_4d(weight_shape)
    block_out, block_in = block_shape_2d(block_shape)
    rows, cols = block_grid(weight_shape, block_shape)
    groups = cols // (r * s)
    w = blocks.reshape(rows, r * s, groups, block_out, block_in).permute(0, 3, 2, 4, 1)
    w = w.reshape(rows * block_out, groups * block_in, r, s)
    return w[:c_out, :c_in].contiguous()


def block_norms(weight: Tensor, block_shape: Sequence[int], p: float = 2.0) -> Tensor:
    """The p-norm of every block, ``(block_rows, block_cols)``, in the weight's dtype; NaN propagates."""
    return torch.linalg.vector_norm(_to_blocks(weight.detach(), block_shape).flatten(2), p, dim=2)


def block_mask(weight: Tensor, block_shape: Sequence[int]) -> Tensor:
    """Which blocks hold a non-zero: bool ``(block_rows, block_cols)``. -0.0 counts as zero, NaN as non-zero."""
    return (_to_blocks(weight.detach(), block_shape) != 0).flatten(2).any(dim=2)


def expand_mask(mask: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]) -> Tensor:
    """A block mask ``(block_rows, block_cols)`` spread over its weight: bool of ``weight_shape`` (2-D or 4-D as given).

    Raises:
        ValueError: the mask is not the block grid of this weight and block shape.
    """
    grid = block_grid(weight_shape, block_shape)
    if tuple(mask.shape) != grid:
        raise ValueError(f"expand_mask: expected mask of shape {grid}, got {tuple(mask.shape)}")
    block_out, block_in = block_shape_2d(block_shape)
    blocks = mask.to(torch.bool)[:, :, None, None].expand(*grid, block_out, block_in)
    return _from_blocks(blocks, weight_shape, block_shape).reshape(tuple(weight_shape))


def broadcast_views(weight: Tensor, mask: Tensor, block_shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """A view of a weight and one of its block mask that broadcast against each other, or a small copy of the mask.

    Spreading the mask over the weight, as `expand_mask` does, costs a training step several times what is done with it.
    None where blocks are ragged, and for weights that are neither contiguous nor channels_last.
    """
    c_out, c_in, r, s = weight_shape_4d(weight.shape)
    block_out, block_in = block_shape
    if c_out % block_out or c_in % block_in:
        return None
    rows, groups, taps = c_out // block_out, c_in // block_in, r * s
    if weight.is_contiguous():
        # Contiguous, because elementwise results take their order of strides from any of their inputs.
        keep = mask.view(rows, taps, groups).transpose(1, 2).contiguous().view(rows, 1, groups, 1, taps)
        return weight.view(rows, block_out, groups, block_in, taps), keep
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        matrix = weight.permute(0, 2, 3, 1)
        return matrix.view(rows, block_out, taps * groups, block_in), mask.view(rows, 1, taps * groups, 1)
    return None


@dataclass(frozen=True)
class BSRWeight:
    """A block-sparse weight.

    Attributes:
        values: ``(capacity, block_out, block_in)`` floating point; the first ``crow_indices[-1]`` blocks are stored
            blocks, in the order of the indices, padded entries exactly 0; blocks past them are spare capacity, exactly
            0 and never read.
        crow_indices: ``(block_rows + 1,)`` int32, from 0, non-decreasing.
        col_indices: ``(capacity,)`` int32, strictly increasing within a block row, each in ``[0, block_cols)``.
        weight_shape: ``(C_out, C_in, R, S)``; R = S = 1 for a linear layer.
        block_shape: ``(block_out, block_in)``.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    weight_shape: tuple[int, int, int, int]
    block_shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, block_shape: Sequence[int], mask: Tensor | None = None) -> BSRWeight:
        """Stores the blocks of ``weight`` (2-D or 4-D) that ``mask`` selects, by default those holding a non-zero.

        A block that the mask leaves out is dropped even where it holds non-zeros.

        Raises:
            ValueError: wrong rank, or a mask that is not the block grid.
            TypeError: a weight that is not floating point.
        """
        if not weight.is_floating_point():
            raise TypeError(f"BSRWeight.from_dense: expected a floating-point weight, got {weight.dtype}")
        shape4d, block = weight_shape_4d(weight.shape), block_shape_2d(block_shape)
        grid = block_grid(shape4d, block)
        if mask is None:
            mask = block_mask(weight, block)
        elif tuple(mask.shape) != grid:
            raise ValueError(f"BSRWeight.from_dense: expected mask of shape {grid}, got {tuple(mask.shape)}")
        mask = mask.to(device=weight.device, dtype=torch.bool)
        crow = torch.zeros(grid[0] + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = mask.sum(dim=1).cumsum(0)
        rows, cols = mask.nonzero(as_tuple=True)
        values = _to_blocks(weight.detach(), block)[rows, cols].contiguous()
        return cls(values, crow, cols.to(torch.int32), shape4d, block)

    def to_dense(self) -> Tensor:
        """The dense weight ``(C_out, C_in, R, S)``; differentiable in ``values``, padded entries excluded."""
        grid = block_grid(self.weight_shape, self.block_shape)
        flat = self.block_rows() * grid[1] + self.col_indices[: self.nnz_blocks].long()
        blocks = self.values.new_zeros(grid[0] * grid[1], *self.block_shape)
        return _from_blocks(
            blocks.index_copy(0, flat, self.values[: self.nnz_blocks]), self.weight_shape, self.block_shape
        )

    def block_rows(self) -> Tensor:
        """Block row of every stored block, ``(nnz_blocks,)`` int64."""
        counts = (self.crow_indices[1:] - self.crow_indices[:-1]).long()
        return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)

    def mask(self) -> Tensor:
        """Which blocks are stored: bool ``(block_rows, block_cols)``."""
        out = torch.zeros(block_grid(self.weight_shape, self.block_shape), dtype=torch.bool, device=self.values.device)
        out[self.block_rows(), self.col_indices[: self.nnz_blocks].long()] = True
        return out

    @property
    def nnz_blocks(self) -> int:
        """Number of stored blocks (reads one element back from the device)."""
        return int(self.crow_indices[-1])

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks that is not stored."""
        rows, cols = block_grid(self.weight_shape, self.block_shape)
        return 1.0 - self.nnz_blocks / (rows * cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored blocks and of both index arrays."""
        block_out, block_in = self.block_shape
        per_block = block_out * block_in * self.values.element_size() + self.col_indices.element_size()
        return self.nnz_blocks * per_block + self.crow_indices.numel() * self.crow_indices.element_size()

    def validate(self) -> None:
        """Checks every rule of the format. Native kernels trust indices that passed here.

        Raises:
            ValueError: a wrong shape or value. TypeError: a wrong dtype. Both name the field, what was expected and
                got.
        """
        rows, _ = block_grid(self.weight_shape, self.block_shape)
        values, crow, col = self.values, self.crow_indices, self.col_indices
        if not values.is_floating_point():
            raise TypeError(f"BSRWeight: expected floating-point values, got {values.dtype}")
        for name, index in (("crow_indices", crow), ("col_indices", col)):
            if index.dtype != torch.int32:
                raise TypeError(f"BSRWeight: expected {name} of dtype torch.int32, got {index.dtype}")
            if index.device != values.device:
                raise ValueError(f"BSRWeight: expected {name} on {values.device}, got {index.device}")
            if index.dim() != 1 or not index.is_contiguous():
                raise ValueError(
                    f"BSRWeight: expected contiguous one-dimensional {name}, got shape {tuple(index.shape)}"
                )
        if values.dim() != 3 or tuple(values.shape[1:]) != tuple(self.block_shape) or not values.is_contiguous():
            raise ValueError(
                f"BSRWeight: expected contiguous values of shape (nnz_blocks, {self.block_shape[0]}, "
                f"{self.block_shape[1]}), got {tuple(values.shape)}"
            )
        if crow.numel() != rows + 1:
            raise ValueError(f"BSRWeight: expected crow_indices of length {rows + 1}, got {crow.numel()}")
        if col.numel() != values.shape[0]:
            raise ValueError(f"BSRWeight: expected col_indices of length {values.shape[0]}, got {col.numel()}")
        row, used = _check_pattern("BSRWeight", crow, col, self.weight_shape, self.block_shape)
        nnz = used.numel()
        padding = ~expand_mask_blocks(self.weight_shape, self.block_shape, row, used)
        if bool((values.detach()[:nnz].cpu()[padding] != 0).any()):
            raise ValueError("BSRWeight: expected padded entries of values to be exactly 0")


_CHECKED_PATTERNS = Checked()


def _pattern_key(weight_shape: Sequence[int], block_shape: Sequence[int]) -> tuple[int, ...]:
    return (*weight_shape, *block_shape)


def _check_pattern(
    name: str, crow: Tensor, col: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Block row and block column of every stored block, on the CPU; remembers that the indices passed.

    Raises:
        ValueError: beginning with ``name``, where the contents of the indices break a rule of `BSRWeight`.
    """
    rows, cols = block_grid(weight_shape, block_shape)
    if cols > 2**31:
        raise ValueError(f"{name}: expected at most 2**31 block columns, which int32 indices count, got {cols}")
    crow64 = crow.long().cpu()
    if int(crow64[0]) != 0:
        raise ValueError(f"{name}: expected crow_indices to start at 0, got {int(crow64[0])}")
    if bool((crow64[1:] < crow64[:-1]).any()):
        raise ValueError(f"{name}: expected non-decreasing crow_indices, got a decrease")
    nnz = int(crow64[-1])
    if nnz > col.numel():
        raise ValueError(f"{name}: expected crow_indices to end at most at {col.numel()}, got {nnz}")
    used = col[:nnz].long().cpu()
    if nnz and (int(used.min()) < 0 or int(used.max()) >= cols):
        bad = int(used.min()) if int(used.min()) < 0 else int(used.max())
        raise ValueError(f"{name}: expected col_indices in [0, {cols}), got {bad}")
    row = torch.repeat_interleave(torch.arange(rows), crow64[1:] - crow64[:-1])
    key = row * cols + used
    if bool((key[1:] <= key[:-1]).any()):
        raise ValueError(f"{name}: expected strictly increasing col_indices within each block row")
    _CHECKED_PATTERNS.remember(_pattern_key(weight_shape, block_shape), crow, col)
    return row, used


def check_pattern(
    name: str, crow: Tensor, col: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> None:
    """Raises ValueError, beginning with ``name``, where indices of the right lengths break a rule of `BSRWeight`.

    The contents are read, which waits for a GPU, once for tensors that stay as they are. While a CUDA graph is
    captured nothing can be read, and the indices are taken as the calls that warmed up left them.
    """
    if _CHECKED_PATTERNS.knows(_pattern_key(weight_shape, block_shape), crow, col):
        return
    if is_capturing(crow):
        return
    _check_pattern(name, crow, col, weight_shape, block_shape)


def expand_mask_blocks(
    weight_shape: Sequence[int], block_shape: Sequence[int], block_rows: Tensor, block_cols: Tensor
) -> Tensor:
    """Entries of the given blocks that lie inside the weight: bool ``(len(block_rows), block_out, block_in)``."""
    c_out, c_in, _r, _s = weight_shape_4d(weight_shape)
    block_out, block_in = block_shape_2d(block_shape)
    groups = -(-c_in // block_in)
    device = block_rows.device
    out = block_rows[:, None] * block_out + torch.arange(block_out, device=device) < c_out
    inside = (block_cols % groups)[:, None] * block_in + torch.arange(block_in, device=device) < c_in
    return out[:, :, None] & inside[:, None, :]


def factor_obstacle(kind: str, shapes: tuple[tuple[int, ...], ...]) -> str | None:
    """Why factors of these shapes are no low-rank weight of this kind; None when they are."""
    if kind not in LOW_RANK_KINDS:
        return f"expected kind in {LOW_RANK_KINDS}, got {kind!r}"
    count = 3 if kind == "tucker2" else 2
    if len(shapes) != count:
        return f"expected {count} factors for kind {kind!r}, got {len(shapes)}"
    dims = {len(s) for s in shapes}
    if dims not in ({4}, {2}) or (dims == {2} and kind != "svd"):
        return f"expected 4-D factors (2-D for a linear svd), got shapes {list(shapes)}"
    for i in range(1, count):
        if shapes[i][1] != shapes[i - 1][0]:
            return f"expected factor {i} to take {shapes[i - 1][0]} channels, got {list(shapes)}"
    if dims == {2}:
        return None
    kernels = [s[2:] for s in shapes]
    fits = {
        "svd": kernels[-1] == (1, 1),
        "tai": kernels[0][1] == 1 and kernels[-1][0] == 1,
        "tucker2": kernels[0] == (1, 1) and kernels[-1] == (1, 1),
    }[kind]
    return None if fits else f"kernel sizes {kernels} are not those of kind {kind!r}"


@dataclass(frozen=True)
class LowRankWeight:
    """Factors of a low-rank weight, in the order in which they are applied.

    ``kind`` is ``"svd"`` for a linear ``(V (rank, in), U (out, rank))`` or a convolution
    ``((K, C, R, S), (N, K, 1, 1))``, ``"tai"`` for the separable pair ``((K, C, R, 1), (N, K, 1, S))`` of Tai et al.
    (arXiv 1511.06067), ``"tucker2"`` for ``((r_in, C, 1, 1), (r_out, r_in, R, S), (N, r_out, 1, 1))``.
    """

    kind: str
    factors: tuple[Tensor, ...]

    def validate(self) -> None:
        """Checks kind, number, shapes and dtypes of the factors. Raises ValueError or TypeError naming the factor."""
        obstacle = factor_obstacle(self.kind, tuple(tuple(f.shape) for f in self.factors))
        if obstacle is not None:
            raise ValueError(f"LowRankWeight: {obstacle}")
        for i, factor in enumerate(self.factors):
            if not factor.is_floating_point() or factor.dtype != self.factors[0].dtype:
                raise TypeError(
                    f"LowRankWeight: expected floating-point factors of one dtype, got {factor.dtype} at {i}"
                )

    def to_dense(self) -> Tensor:
        """The product of the factors: ``(out, in)`` for a linear, ``(C_out, C_in, R, S)`` for a convolution."""
        if self.factors[0].dim() == 2:
            v, u = self.factors
            return u @ v
        if self.kind == "tai":
            vertical, horizontal = self.factors
            return torch.einsum("kcr,nks->ncrs", vertical[..., 0], horizontal[:, :, 0, :])
        if self.kind == "svd":
            first, last = self.factors
            return torch.einsum("kcrs,nk->ncrs", first, last[:, :, 0, 0])
        first, core, last = self.factors
        return torch.einsum("no,oirs,ic->ncrs", last[:, :, 0, 0], core, first[:, :, 0, 0])

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(f.numel() * f.element_size() for f in self.factors)


class BlockMask(nn.Module):
    """Parametrization that keeps the masked blocks of a weight at exactly 0, without gradient, while training.

    Args:
        mask: bool ``(block_rows, block_cols)``, True where a block lives; a persistent buffer.
        weight_shape: shape of the weight, 2-D or 4-D.
        block_shape: ``(block_out, block_in)``, kept in the module's extra state.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]) -> None:
        super().__init__()
        self.weight_shape = tuple(map(int, weight_shape))
        self.block_shape = block_shape_2d(block_shape)
        grid = block_grid(self.weight_shape, self.block_shape)
        if tuple(mask.shape) != grid:
            raise ValueError(f"BlockMask: expected mask of shape {grid}, got {tuple(mask.shape)}")
        self.register_buffer("mask", mask.to(torch.bool).clone())

    def forward(self, weight: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        views = broadcast_views(weight, self.mask, self.block_shape)
        if views is None:
            return torch.where(expand_mask(self.mask, self.weight_shape, self.block_shape), weight, zero)
        kept = torch.where(views[1], views[0], zero)
        if weight.is_contiguous():
            return kept.view(weight.shape)
        return kept.view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the masked weight stores the tensor as it is; the mask applies on reading."""
        return weight

    def get_extra_state(self) -> dict[str, Any]:
        return {"block_shape": list(self.block_shape), "weight_shape": list(self.weight_shape)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        saved = tuple(state["block_shape"]), tuple(state["weight_shape"])
        if saved != (self.block_shape, self.weight_shape):
            raise ValueError(
                f"BlockMask: expected block_shape {self.block_shape} and weight_shape {self.weight_shape}, "
                f"got {saved[0]}, {saved[1]}"
            )

    def extra_repr(self) -> str:
        return f"block_shape={self.block_shape}, block_sparsity={1 - self.mask.float().mean().item():.3f}"
