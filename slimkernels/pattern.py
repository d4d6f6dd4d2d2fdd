"""Changing which blocks a block-sparse module stores while it trains, its optimisers' state included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from slimkernels.formats import block_grid
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear


def update_pattern(
    module: BlockSparseConv2d | BlockSparseLinear, mask: Tensor, optimizers: Optimizer | Iterable[Optimizer] = ()
) -> None:
    """Makes ``module`` store exactly the blocks of ``mask``, in place.

    Blocks stored before and after keep their values, gradients and optimiser state; new blocks start at 0 with zero
    state; the state of dropped blocks is forgotten. Storage keeps its capacity, the number of blocks the module was
    built with: ``values`` stays the same Parameter of the same shape, so running optimisers, DDP and CUDA graphs go
    on; only a layer on the tensor-core kernel keeps, in a graph, the pattern of its capture. Slots past the stored
    blocks are exactly 0, are never read and get no gradient.

    Every tensor in the optimisers' state of ``values`` that has one entry per block is moved along: momentum and
    moments shaped like ``values``, factored moments of shape ``(capacity, block_out, 1)`` or ``(capacity, 1,
    block_in)``. An optimiser that does not hold ``values`` is not touched.

    With `torch.distributed` initialised this is a collective call: rank 0's mask is broadcast, the others' are
    ignored, and all ranks raise where rank 0's mask is refused.

    Args:
        module: a block-sparse module.
        mask: bool ``(block_rows, block_cols)``, True where a block is stored afterwards (`formats.block_grid`).
        optimizers: every optimiser that holds ``module.values``. One left out keeps state that belongs to other
            blocks.

    Raises:
        TypeError: not a block-sparse module, a mask that is not bool, or something that is not an optimiser.
        ValueError: a mask of another shape, more blocks than the capacity, or optimiser state that has no entry per
            block (LBFGS). Nothing is changed then.
    """
    if not isinstance(module, (BlockSparseConv2d, BlockSparseLinear)):
        raise TypeError(
            f"update_pattern: expected a BlockSparseConv2d or BlockSparseLinear, got {type(module).__name__}"
        )
    holders = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for optimizer in holders:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"update_pattern: expected optimizers of torch.optim, got {type(optimizer).__name__}")
    mask = _agreed_mask(module, mask)
    values = module.values
    moved = [values, *_per_block_state(values, holders)]
    if values.grad is not None:
        moved.append(values.grad)
    weight = module.weight_bsr()
    slot = torch.full(tuple(mask.shape), -1, dtype=torch.long, device=values.device)
    slot[weight.block_rows(), weight.col_indices[: weight.nnz_blocks].long()] = torch.arange(
        weight.nnz_blocks, device=values.device
    )
    source = slot[mask]
    kept = source >= 0
    with torch.no_grad():
        for tensor in moved:
            remapped = torch.zeros_like(tensor)
            remapped[: source.numel()][kept] = tensor[source[kept]]
            tensor.copy_(remapped)
        module.crow_indices[1:] = mask.sum(dim=1).cumsum(0)
        module.col_indices.zero_()
        module.col_indices[: source.numel()] = mask.nonzero()[:, 1]
    module.pattern_changed()


def _agreed_mask(module: BlockSparseConv2d | BlockSparseLinear, mask: Tensor) -> Tensor:
    """The checked mask on the module's device, rank 0's where processes share the model."""
    grid = block_grid(module.weight_shape, module.block_shape)
    capacity, device = module.values.shape[0], module.values.device
    spread = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not spread:
        error = _mask_error(mask, grid, capacity)
        if error is not None:
            raise error
        return mask.to(device)
    message = torch.zeros(1 + grid[0] * grid[1], dtype=torch.uint8, device=device)
    error = _mask_error(mask, grid, capacity) if distributed.get_rank() == 0 else None
    if distributed.get_rank() == 0 and error is None:
        message[0] = 1
        message[1:] = mask.reshape(-1).to(device)
    distributed.broadcast(message, src=0)
    if error is not None:
        raise error
    if int(message[0]) == 0:
        raise ValueError("update_pattern: rank 0 refused its mask; see its error")
    return message[1:].reshape(grid).bool()


def _mask_error(mask: Tensor, grid: tuple[int, int], capacity: int) -> Exception | None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        return TypeError(f"update_pattern: expected a bool mask, got {got}")
    if tuple(mask.shape) != grid:
        return ValueError(f"update_pattern: expected mask of shape {grid}, got {tuple(mask.shape)}")
    blocks = int(mask.sum())
    if blocks > capacity:
        return ValueError(
            f"update_pattern: expected at most {capacity} blocks, the capacity of values, got {blocks}; to grow, build "
            "a new module with from_dense(module.to_dense(), block_shape, mask) and a new optimizer for it"
        )
    return None


def _per_block_state(values: torch.nn.Parameter, optimizers: list[Optimizer]) -> list[Tensor]:
    """Every state tensor of `values` with one entry per block."""
    found = []
    for optimizer in optimizers:
        state = optimizer.state.get(values, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] == values.shape[0]:
                found.append(value)
            elif isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() > 1):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(
                    f"update_pattern: expected state {key!r} of {type(optimizer).__name__} to be shaped like values "
                    f"{tuple(values.shape)}, got {got}"
                )
    return found
