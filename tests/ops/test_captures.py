"""What a captured CUDA graph reads stays in memory: packs, and what follows from a pattern, made by the package itself.

No GPU is needed: a stand-in says that a graph is being captured.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels import tensors
from slimkernels.compress.training import graphed_steps
from slimkernels.compress.training.graphed_steps import EAGER_STEPS, GraphedSteps
from slimkernels.kernels import KERNELS, cuda_tensor_cores
from slimkernels.kernels.triton import bsr_conv2d_index
from slimkernels.nn import BlockSparseConv2d
from slimkernels.tensors import Derived, keep_for_graphs, kept_with_a_graph


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether a CUDA graph is being captured."""
    now = [False]
    for module in (tensors, bsr_conv2d_index):
        monkeypatch.setattr(module, "is_capturing", lambda tensor: now[0])

    def set_to(captured: bool) -> None:
        now[0] = captured

    return set_to


def memory(tensor: Tensor) -> weakref.ref[Any]:
    """Lives as long as the tensor's memory: a storage that Python has seen is one object."""
    return weakref.ref(tensor.untyped_storage())


class Two(NamedTuple):
    first: Tensor
    second: Tensor


def test_what_follows_from_a_pattern_outlives_its_rewriting_where_a_graph_reads_it(capturing) -> None:
    derived, patterns = Derived(), [torch.arange(4)]

    def of() -> Two:
        (pattern,) = patterns
        return derived.of("twice", (pattern,), lambda: Two(pattern * 2, pattern + 1))

    def rewritten() -> list[bool]:
        """Whether what was handed out before a write to the pattern is still there after it."""
        places = [memory(t) for t in of()]
        patterns[0].add_(1)
        of()
        gc.collect()
        return [place() is not None for place in places]

    assert rewritten() == [False, False]
    of()
    capturing(True)
    found = [memory(t) for t in of()]
    capturing(False)
    assert rewritten() == [True, True] and rewritten() == [False, False]
    patterns.clear()
    gc.collect()
    assert [place() for place in found] == [None, None], "kept for no longer than the pattern"


def test_a_graph_of_our_own_keeps_what_it_reads_itself(capturing) -> None:
    owner, read, other = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    capturing(True)
    with kept_with_a_graph() as kept, kept_with_a_graph() as inner:
        keep_for_graphs(owner, [read, read[:1], other])
    keep_for_graphs(owner, [torch.zeros(4)])  # of another capture: with its owner
    assert [t.shape for t in kept] == [t.shape for t in inner] == [(2,), (3,)]
    assert kept[0].data_ptr() == read.data_ptr() and not tensors._GRAPHS_BEING_CAPTURED
    assert [t.shape for t in tensors._READ_BY_GRAPHS[owner]] == [(4,)]
    capturing(False)
    with kept_with_a_graph() as kept:
        keep_for_graphs(owner, [read])
    assert not kept


def layer(**options: Any) -> BlockSparseConv2d:
    conv = nn.Conv2d(16, 32, 3, padding=1)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    return BlockSparseConv2d.from_dense(conv, (16, 16), mask, **options)


@pytest.mark.parametrize("what", ["pattern", "stride", "train"])
def test_packs_and_indices_of_a_module_outlive_their_replacement(capturing, what: str) -> None:
    module, x = layer(), torch.randn(1, 16, 5, 5, requires_grad=True)
    module.train(what != "train")
    capturing(True)
    module(x).sum().backward()
    capturing(False)
    # Without gradients and with a frozen weight the pack is read.
    if what == "train":
        module.values.requires_grad_(False)
        capturing(True)
        with torch.no_grad():
            torch.ops.slimkernels.bsr_conv2d(
                x, module.values, module.crow_indices, module.col_indices, module.bias, module._packed(),
                module.weight_shape, module.block_shape, module.stride, module.padding, module.dilation, "none", "auto",
            )  # fmt: skip
        capturing(False)
    held = module._packed() if what == "train" else [module.transposed]
    assert held
    places = [memory(t) for t in held]
    del held
    if what == "pattern":
        sk.update_pattern(module, torch.rand(2, 9) < 0.4)
    elif what == "stride":
        module.stride = (2, 2)
    else:
        module.train()
    gc.collect()
    assert all(place() is not None for place in places)


def test_the_input_sharing_order_is_kept_and_never_made_in_a_capture(capturing) -> None:
    module = layer()
    crow, col = module.crow_indices, module.col_indices
    capturing(True)
    with pytest.raises(RuntimeError, match="bsr_conv2d: the order of the input-sharing kernel must be made before"):
        bsr_conv2d_index.remembered_shared_input(crow, col, 2)
    capturing(False)
    bsr_conv2d_index.remembered_shared_input(crow, col, 2)
    capturing(True)
    places = [memory(t) for t in bsr_conv2d_index.remembered_shared_input(crow, col, 2)]
    capturing(False)
    col.add_(0)
    bsr_conv2d_index.remembered_shared_input(crow, col, 2)
    gc.collect()
    assert all(place() is not None for place in places)


class Step(nn.Module):
    """A step that holds a layer of the tensor-core kernel, which this machine need not have."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        assert kernel in KERNELS
        self.layer = layer()
        self.layer.kernel = "auto"
        self.layer.__dict__["kernel"] = kernel

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer.values.sum() * x).sum()


@pytest.mark.parametrize(
    ("kernel", "expected"), [(cuda_tensor_cores.NAME, ["eager", "captured"]), ("bsr_conv2d__triton", ["replayed"] * 2)]
)
def test_a_pattern_that_a_captured_step_holds_fixed_is_met_before_the_next_capture(
    kernel: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Step(kernel), list[str]()

    class Graph:
        def replay(self) -> None:
            done.append("replayed")

        def pool(self) -> None:
            return None

    def capture(call: Callable[[], Tensor], **_: Any) -> tuple[Graph, Tensor]:
        loss = call()
        done[-1] = "captured"
        return Graph(), loss

    def backward(batch: list[Tensor]) -> Tensor:
        done.append("eager")
        loss = step(*batch)
        loss.backward()
        return loss.detach()

    monkeypatch.setattr(graphed_steps, "capture", capture)
    steps = GraphedSteps("fine_tune", step, backward, [])

    def call() -> str:
        step.zero_grad(set_to_none=True)
        done.clear()
        steps([torch.ones(2)])
        return done[0]

    assert [call() for _ in range(EAGER_STEPS + 2)] == ["eager"] * EAGER_STEPS + ["captured", "replayed"]
    sk.update_pattern(step.layer, torch.ones(2, 9, dtype=torch.bool) & (torch.arange(9) < 2))
    assert [call(), call()] == expected and call() == "replayed"
