"""Which recording of a larger batch takes smaller inputs, and what of its outputs belongs to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from slimkernels.kernels.cpu.pairs import may_be_in_bf16


def fitting(recorded: Iterable[Any], key: Any) -> tuple[Any, int, int] | None:
    """``(signature, its batch, the given batch)`` of the smallest recorded batch that holds inputs; None without one.

    Signatures are those of `slimkernels.inference.inputs.signature`. Two fit where they differ in the first size of
    some tensors alone, and all these are one number on either side.
    """
    found = []
    for other in recorded:
        if other[1] != key[1] or len(other[0]) != len(key[0]):
            continue
        batches = {_batches(a, b) for a, b in zip(other[0], key[0])} - {(None, None)}
        if len(batches) == 1:
            batch, given = next(iter(batches))
            if batch is not None and given is not None and 0 < given < batch:
                found.append((batch, given, other))
    if not found:
        return None
    batch, given, other = min(found, key=lambda item: item[0])
    return other, batch, given


def _batches(recorded: Any, given: Any) -> tuple[int | None, int | None]:
    """The first sizes where they are all that differs, two None where nothing does, (-1, -1) for anything else."""
    if recorded == given:
        return None, None
    shaped = all(isinstance(p, tuple) and len(p) == 3 and isinstance(p[1], torch.dtype) for p in (recorded, given))
    if not shaped or recorded[1:] != given[1:] or not recorded[0] or not given[0] or recorded[0][1:] != given[0][1:]:
        return -1, -1
    return recorded[0][0], given[0][0]


def filled_up(args: Any, kwargs: Any, recorded: Any, noise: bool = False) -> tuple[Any, Any]:
    """Inputs with zeros behind them, in the sizes of the recorded signature that `fitting` found.

    Args:
        noise: random numbers behind floating-point inputs instead, the same in every call; behind others zeros, since
            they may be places in a table.
    """
    generator = torch.Generator().manual_seed(0)
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    for i, (value, part) in enumerate(zip(leaves, recorded[0])):
        if isinstance(value, Tensor) and tuple(value.shape) != part[0]:
            images = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if images else torch.contiguous_format
            whole = torch.zeros(part[0], dtype=value.dtype, device=value.device).contiguous(memory_format=layout)
            whole[: value.shape[0]] = value
            if noise and value.dtype.is_floating_point:
                rest = whole[value.shape[0] :]
                rest.copy_(torch.randn(rest.shape, generator=generator))
            leaves[i] = whole
    return _pytree.tree_unflatten(leaves, spec)


def cut(outputs: Any, given: int, batch: int) -> Any:
    """The part of a batch's outputs that belongs to its first images."""

    def one(value: Any) -> Any:
        return value[:given] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value

    return _pytree.tree_map(one, outputs)


def like_the_model(expected: Any, got: Any, in_bf16: bool = False) -> bool:
    """Whether outputs are those of the model up to the order of its sums, and the precision of its products."""
    if _pytree.tree_structure(expected) != _pytree.tree_structure(got):
        return False
    return all(same(a, b, in_bf16) for a, b in zip(_pytree.tree_leaves(expected), _pytree.tree_leaves(got)))


def same(a: Any, b: Any, in_bf16: bool = False) -> bool:
    """Whether two outputs of one model are equal up to the order of its sums, and the precision of its products.

    Args:
        in_bf16: whether float32 was multiplied in bf16 on a CPU. It may also have been while torch's switches allow it.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return torch.equal(a, b)
    if may_be_in_bf16(a) or (in_bf16 and a.dtype is torch.float32 and a.is_cpu):
        return _same_in_bf16(a.detach(), b.detach())
    finite = a.detach()[torch.isfinite(a)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    # Sums in another order differ by about 1e-6 of the largest value, through many layers by 100 times as much.
    tolerance = 5e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _same_in_bf16(a: Tensor, b: Tensor) -> bool:
    """The same of float32 and of what was multiplied in bf16.

    The root of the mean square tells more than the largest difference: of a random ResNet-50 at 224x224 that is 6% of
    the largest output, by torch's own bf16 7%, where the former are 4.5% and 6.0%. A wrong layer makes about 100%.
    """
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return False
    if not bool(finite.any()):
        return True
    x, y = a[finite].double(), b[finite].double()
    return float((x - y).square().mean()) <= 1e-2 * float(x.square().mean())
