"""`update_pattern`: values, gradients and optimiser state follow their blocks; identity, capacity, processes."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimkernels.formats import block_grid, expand_mask
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear
from slimkernels.pattern import update_pattern

BLOCK = (4, 2)
SHAPE = (10, 5, 3, 2)  # ragged in both directions


def random_mask(grid: tuple[int, int], blocks: int, seed: int) -> torch.Tensor:
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[order[:blocks]] = True
    return mask.view(grid)


def make_conv(blocks: int, seed: int = 0, shape: tuple[int, int, int, int] = SHAPE) -> BlockSparseConv2d:
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], padding=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    return BlockSparseConv2d.from_dense(conv, BLOCK, random_mask(block_grid(shape, BLOCK), blocks, seed))


def dense(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor shaped like `values`, as a dense weight under the module's present pattern."""
    weight = module.weight_bsr()
    return replace(weight, values=tensor).to_dense()


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(params):
    return torch.optim.Adam(params, lr=0.02, amsgrad=True)


def adafactor(params):
    return torch.optim.Adafactor(params, lr=0.02)


def train(module: nn.Module, optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(2, SHAPE[1], 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 7), st.integers(1, 2), st.integers(1, 3)),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
def test_kept_blocks_stay_new_ones_are_zero_and_the_format_stays_valid(shape, data, seed):
    grid = block_grid(shape, BLOCK)
    capacity = data.draw(st.integers(0, grid[0] * grid[1]))
    module = make_conv(capacity, seed, shape)
    values = module.values
    for step in range(3):
        before, old = module.weight_bsr().to_dense().detach(), module.weight_bsr().mask()
        blocks = data.draw(st.integers(0, capacity))
        mask = random_mask(grid, blocks, seed + 1 + step)
        update_pattern(module, mask)
        assert module.values is values and values.shape[0] == capacity
        weight = module.weight_bsr()
        weight.validate()
        assert torch.equal(weight.mask(), mask)
        keep = expand_mask(mask & old, shape, BLOCK)
        assert torch.equal(weight.to_dense().detach(), torch.where(keep, before, 0.0))
        assert bool((values[blocks:] == 0).all()) and bool((module.col_indices[blocks:] == 0).all())


@pytest.mark.parametrize("make", [sgd, adam], ids=["sgd", "adam"])
def test_optimizer_state_and_gradient_follow_their_blocks(make):
    module = make_conv(12)
    optimizer = make(module.parameters())
    train(module, optimizer, 3, seed=5)
    state = {k: v for k, v in optimizer.state[module.values].items() if torch.is_tensor(v) and v.dim() == 3}
    assert state and all(bool((v != 0).any()) for v in state.values())
    before = {k: dense(module, v) for k, v in state.items()}
    gradient, bias_state = dense(module, module.values.grad), copy.deepcopy(optimizer.state[module.bias])
    old, mask = module.weight_bsr().mask(), random_mask(block_grid(SHAPE, BLOCK), 9, seed=77)
    assert bool((mask & old).any()) and bool((mask & ~old).any()) and bool((~mask & old).any())
    update_pattern(module, mask, optimizer)
    keep = expand_mask(mask & old, SHAPE, BLOCK)
    for key, value in state.items():
        assert optimizer.state[module.values][key] is value
        assert torch.equal(dense(module, value), torch.where(keep, before[key], 0.0))
        assert bool((value[9:] == 0).all())
    assert torch.equal(dense(module, module.values.grad), torch.where(keep, gradient, 0.0))
    for key, value in bias_state.items():
        now = optimizer.state[module.bias][key]
        assert torch.equal(value, now) if torch.is_tensor(value) else value == now


@pytest.mark.parametrize("make", [sgd, adam], ids=["sgd", "adam"])
def test_training_after_an_update_is_that_of_a_masked_dense_layer(make):
    """The dense twin's weight, gradient and optimiser state are masked by hand, at the update and at every step."""
    module = make_conv(12).double()
    twin = module.to_dense()
    ours, theirs = make(module.parameters()), make(twin.parameters())
    pattern = module.weight_bsr().mask()

    def twin_step(x: torch.Tensor, live: torch.Tensor) -> None:
        theirs.zero_grad()
        twin(x).square().mean().backward()
        twin.weight.grad.mul_(live)
        theirs.step()

    generator = torch.Generator().manual_seed(3)
    live = expand_mask(pattern, SHAPE, BLOCK)
    for step in range(6):
        if step == 3:
            new = random_mask(block_grid(SHAPE, BLOCK), 10, seed=4)
            update_pattern(module, new, (ours,))
            kept, live = expand_mask(new & pattern, SHAPE, BLOCK), expand_mask(new, SHAPE, BLOCK)
            with torch.no_grad():
                twin.weight.mul_(kept)
                for value in theirs.state[twin.weight].values():
                    if torch.is_tensor(value) and value.dim() == 4:
                        value.mul_(kept)
        x = torch.randn(2, SHAPE[1], 6, 6, generator=generator, dtype=torch.float64)
        ours.zero_grad()
        module(x).square().mean().backward()
        ours.step()
        twin_step(x, live)
        torch.testing.assert_close(module.weight_bsr().to_dense(), twin.weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(module.bias, twin.bias, rtol=1e-9, atol=1e-11)
    assert bool((module.values[10:] == 0).all())


def test_factored_second_moments_are_moved_per_block():
    module = make_conv(12)
    optimizer = adafactor(module.parameters())
    train(module, optimizer, 2, seed=5)
    state = optimizer.state[module.values]
    assert tuple(state["row_var"].shape) == (12, 4, 1) and tuple(state["col_var"].shape) == (12, 1, 2)
    old = module.weight_bsr().mask()
    mask = old.clone()
    mask[tuple(old.nonzero()[0])] = False  # slot 0 goes, every other block moves down by one
    row, col = state["row_var"].clone(), state["col_var"].clone()
    update_pattern(module, mask, [optimizer])
    assert torch.equal(state["row_var"][:11], row[1:]) and bool((state["row_var"][11] == 0).all())
    assert torch.equal(state["col_var"][:11], col[1:]) and bool((state["col_var"][11] == 0).all())
    train(module, optimizer, 1, seed=6)
    assert bool(torch.isfinite(module.values).all())


def test_spare_slots_stay_zero_under_momentum_and_decay():
    module = make_conv(12)
    optimizer = sgd(module.parameters())
    train(module, optimizer, 2, seed=1)
    update_pattern(module, module.weight_bsr().mask() & random_mask(block_grid(SHAPE, BLOCK), 20, 9), optimizer)
    blocks = module.weight_bsr().nnz_blocks
    assert 0 < blocks < 12
    train(module, optimizer, 3, seed=2)
    assert bool((module.values[blocks:] == 0).all()) and bool((module.values.grad[blocks:] == 0).all())


def test_linear_and_forward_in_eval_see_the_new_pattern():
    linear = nn.Linear(24, 32)
    module = BlockSparseLinear.from_dense(linear, (16, 1), torch.ones(2, 24, dtype=torch.bool)).eval()
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(x)  # whatever the forward keeps between calls exists now
        packed = module.packed_weights is not None
        mask = random_mask((2, 24), 11, seed=3)
        update_pattern(module, mask)
        expected = nn.functional.linear(x, linear.weight * expand_mask(mask, (32, 24), (16, 1)), linear.bias)
        torch.testing.assert_close(module(x), expected)
        assert (module.packed_weights is not None) == packed  # rebuilt, neither stale nor missing


def test_state_dict_with_spare_capacity_round_trips():
    module = make_conv(12)
    update_pattern(module, random_mask(block_grid(SHAPE, BLOCK), 7, seed=8))
    other = make_conv(12, seed=5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight_bsr().mask(), module.weight_bsr().mask())
    assert torch.equal(other.weight_bsr().to_dense(), module.weight_bsr().to_dense())
    update_pattern(other, random_mask(block_grid(SHAPE, BLOCK), 12, seed=9))
    assert other.weight_bsr().nnz_blocks == 12


def test_backward_through_a_replaced_pattern_is_refused():
    module = make_conv(12)
    y = module(torch.randn(1, SHAPE[1], 6, 6)).sum()
    update_pattern(module, random_mask(block_grid(SHAPE, BLOCK), 12, seed=9))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_bad_input_raises_and_changes_nothing():
    module = make_conv(6)
    before = copy.deepcopy(module.state_dict())
    grid = block_grid(SHAPE, BLOCK)
    with pytest.raises(TypeError, match=r"expected a BlockSparseConv2d or BlockSparseLinear, got Conv2d"):
        update_pattern(nn.Conv2d(5, 10, 3), torch.ones(grid, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"update_pattern: expected a bool mask, got torch.float32"):
        update_pattern(module, torch.ones(grid))
    with pytest.raises(ValueError, match=r"update_pattern: expected mask of shape \(3, 18\), got \(18, 3\)"):
        update_pattern(module, torch.ones(18, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected at most 6 blocks, the capacity of values, got 7; to grow"):
        update_pattern(module, random_mask(grid, 7, 1))
    with pytest.raises(TypeError, match=r"update_pattern: expected optimizers of torch.optim, got Parameter"):
        update_pattern(module, random_mask(grid, 5, 1), module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(1, SHAPE[1], 6, 6)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"expected state '\w+' of LBFGS to be shaped like values \(6, 4, 2\), got"):
        update_pattern(module, random_mask(grid, 5, 1), optimizer)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        module = make_conv(12)
        model = nn.parallel.DistributedDataParallel(module)
        optimizer = sgd(model.parameters())
        grid = block_grid(SHAPE, BLOCK)
        train(model, optimizer, 2, seed=rank)
        update_pattern(module, random_mask(grid, 9, seed=rank), optimizer)
        train(model, optimizer, 2, seed=10 + rank)
        refused = False
        try:
            update_pattern(module, random_mask(grid, 13 if rank == 0 else 5, seed=3), optimizer)
        except ValueError:
            refused = True
        torch.save({"state": module.state_dict(), "refused": refused}, f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_take_rank_0s_mask_and_stay_equal(tmp_path):
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["refused"] and second["refused"]
    assert all(torch.equal(first["state"][k], second["state"][k]) for k in first["state"])
    module = make_conv(12)
    module.load_state_dict(first["state"])
    assert torch.equal(module.weight_bsr().mask(), random_mask(block_grid(SHAPE, BLOCK), 9, seed=0))
