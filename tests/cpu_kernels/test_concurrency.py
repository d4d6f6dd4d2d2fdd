"""Threads at different chains of a recording: what may run together keeps apart, and delays change nothing."""

from __future__ import annotations

import itertools
import random

import native_memory
import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.inference import Replay
from slimkernels.inference import cpu_recording as recording
from slimkernels.inference.concurrency import byte_ranges, conflict
from slimkernels.kernels.cpu import chain as chains
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import LANES

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = [
    pytest.mark.skipif(not ISAS, reason="the native kernels are not built"),
    pytest.mark.usefixtures("innermost_first"),
]


class RandomNet(nn.Module):
    """Convolutions whose outputs are added, concatenated or read by several heads, on images of 4 x 4."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kinds = [rng.choice(("residual", "concat", "branches", "plain")) for _ in range(rng.randint(1, 3))]
        width = self.inputs = rng.choice((3, 16, 32))
        self.blocks = nn.ModuleList()
        for kind in self.kinds:
            stem, inner = rng.choice((16, 32, 48)), rng.choice((16, 32, 64))
            last = stem if kind != "concat" else rng.choice((16, 32))
            first, second = (nn.Sequential(self.conv(rng, *c), nn.ReLU()) for c in ((width, stem), (stem, inner)))
            self.blocks.append(nn.ModuleList([first, second, self.conv(rng, inner, last)]))
            width = stem + last if kind == "concat" else last
        sizes = [rng.choice((16, 32, 48)) for _ in range(rng.randint(1, 3))]
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.spatial = nn.ModuleList(self.conv(rng, width, size) for size in sizes)
        self.rows = rng.random() < 0.3

    @staticmethod
    def conv(rng: random.Random, c_in: int, c_out: int) -> nn.Conv2d:
        side = rng.choice((1, 3))
        return nn.Conv2d(c_in, c_out, side, padding=side // 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        for kind, block in zip(self.kinds, self.blocks):
            stem, first, second = block
            y = stem(x)
            z = second(first(y))
            if kind == "plain":
                x = z
            elif kind == "concat":
                x = torch.cat([y, z], 1)
            else:
                x = y + z if kind == "residual" else y + z + second(first(y))
        rows = x.permute(0, 2, 3, 1) if self.rows else x.mean((2, 3))
        return [head(rows) for head in self.heads] + [conv(x) for conv in self.spatial]


def recorded_and_run(seed: int, monkeypatch: pytest.MonkeyPatch, batch: int | None = None) -> int:
    """A random net recorded and run with random delays computes what the model does; the pairs that ran together."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    isa, threads = rng.choice(ISAS), rng.choice((2, 2, 3))
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    torch.set_num_threads(1)
    net = RandomNet(rng)
    layers = [name for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    sk.finalize_(sk.prune_(net, 0.5, (16, 1), layers=layers))
    fast = sk.convert(net.eval(), policy=sk.Policy(min_speedup=0, dense_layers=False))
    batch = batch or LANES[isa] * threads * rng.choice((1, 1, 2)) + rng.choice((0, 0, 0, 3))
    seeds, pairs = itertools.count(1000 * seed + 1), []

    def delayed(self: native.Steps) -> None:
        assert self._steps.run_delayed(torch.get_num_threads(), next(seeds)) == 0

    class Counted(native.Steps):
        def __init__(self, isa: str, steps: list[native.Step]) -> None:
            super().__init__(isa, steps)
            pairs.append(len(list(native_memory.together(steps))))

    monkeypatch.setattr(native.Steps, "__call__", delayed)
    monkeypatch.setattr(recording, "Steps", Counted)
    inputs = torch.randn(4, batch, net.inputs, 4, 4)
    with torch.no_grad():
        expected = [net(x) for x in inputs[1:]]
        torch.set_num_threads(threads)
        replay = Replay(fast, inputs[0])
        for x, outputs in zip(inputs[1:], expected, strict=True):
            for got, want in zip(replay(x), outputs, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    return sum(pairs)


def test_delayed_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = [recorded_and_run(seed, monkeypatch) for seed in range(6)]
    assert sum(count > 0 for count in together) > 3, "the nets run on threads of their own"


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_delayed_threads_change_nothing_image_by_image(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "forms", lambda *_: [chains.Form.IMAGES])
    assert sum(recorded_and_run(seed, monkeypatch, batch) for seed in (2, 3)) > 0, "images run on threads of their own"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_delayed_threads_change_nothing_in_many_nets(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000 + first, 1020 + first):
        recorded_and_run(seed, monkeypatch)


class Neighbours(nn.Module):
    """Two chains behind each other, of other sizes: what the first leaves is read by the second and by another op."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(c_in, 64, 3, padding=1), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.second = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return torch.maximum(self.second(self.first(y)), y)


@pytest.mark.parametrize(("c_in", "calls"), [(16, 2), (64, 1)])
def test_chains_meet_where_their_memory_overlaps(c_in: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of the same size have each thread in its own part of the memory; others have to meet in between."""
    monkeypatch.setenv("SLIMKERNELS_ISA", ISAS[-1])
    found: list[list[native.Step]] = []

    class Seen(native.Steps):
        def __init__(self, isa: str, steps: list[native.Step]) -> None:
            super().__init__(isa, steps)
            found.append(list(steps))

    monkeypatch.setattr(recording, "Steps", Seen)
    # On a busy machine another form may be measured to be faster, and its steps have no slots.
    monkeypatch.setattr(recording, "in_fastest_forms", lambda graph, chains: chains)
    model = Neighbours(c_in)
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["stem.0", "first.0", "second"]))
    fast = sk.convert(model.eval(), policy=sk.Policy(measure=False, min_speedup=0))
    torch.set_num_threads(2)
    x = torch.randn(2 * LANES[ISAS[-1]], c_in, 6, 6)
    replay = Replay(fast, x)
    assert len(found) == calls and all(step.slot >= 0 for steps in found for step in steps)
    assert (conflict([step for steps in found for step in steps]) is None) == (calls == 1)
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)


def test_conflicts_of_steps_by_hand() -> None:
    lanes = LANES[ISAS[-1]]
    memory = torch.zeros(6 * 2 * lanes)

    def step(source: int, target: int, slot: int) -> native.Step:
        """A copy between two of six places."""
        far, near = (memory[i * 2 * lanes : (i + 1) * 2 * lanes] for i in (target, source))
        made = native.layout_step(near.view(lanes, 2), far.view(1, 1, 1, 2, lanes), lanes)
        return made._replace(slot=slot)

    assert conflict([step(0, 1, 0), step(1, 2, 0)]) is None  # a thread's own steps follow each other
    assert conflict([step(0, 1, 0), step(0, 2, 1)]) is None  # both read
    assert conflict([step(0, 1, 0), step(1, 2, 1)]) == (0, 1)
    assert conflict([step(0, 1, 0), step(2, 0, 1)]) == (0, 1)
    assert conflict([step(0, 1, 0), step(2, 1, 1)]) == (0, 1)
    assert conflict([step(0, 1, 0), step(1, 2, -1), step(2, 1, 1)]) is None
    assert conflict([step(0, 1, -1), step(1, 2, 0), step(3, 4, 0), step(3, 5, 1), step(5, 2, 1)]) == (1, 4)
    for steps in ([step(0, 1, 0), step(1, 2, 1)], [step(2, 1, 0), step(0, 3, 0), step(3, 1, 1)]):
        with pytest.raises(AssertionError, match="may run at the same time"):
            native_memory.check(steps)
    assert native_memory.check([step(0, 1, 0), step(0, 2, 1)]) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lanes", [1, LANES[ISAS[-1]] if ISAS else 1])
def test_steps_know_every_byte_that_they_touch(bias: bool, residual: bool, lanes: int) -> None:
    isa, n = ISAS[-1], 5
    layer = nn.Conv2d(6, 20, 3, padding=1, bias=bias)
    epilogue = "relu" if residual else "relu_maxpool2"
    sparse = sk.nn.BlockSparseConv2d.from_dense(layer, (16, 1), epilogue=epilogue)
    packed = native.pack_strips(
        sparse.values.detach(), sparse.crow_indices, sparse.col_indices, (20, 6, 3, 3), (16, 1), 16
    )
    conv = native.PackedConv2d(isa, packed, (20, 6, 3, 3), (1, 1), (1, 1), (1, 1), epilogue)
    side = 5 if residual else 2
    x, y, added = (torch.zeros(n, h, h, c).permute(0, 3, 1, 2) for h, c in ((5, 6), (side, 20), (side, 20)))
    steps = []
    if lanes > 1:
        near, far = x, y
        sizes = ((5, 6), (side, 20), (side, 20))
        x, y, added = (torch.zeros(native.images_innermost(n, h, h, c, isa)) for h, c in sizes)
        steps = [native.layout_step(near, x, n), native.layout_step(y, far, n)]
    steps.append(conv.step(x, y, sparse.bias, n, conv.entry_offsets(5, 5, lanes), added if residual else None))
    for step in steps:
        assert sorted(byte_ranges(step)) == sorted(native_memory.ranges(step))
    assert len(native_memory.ranges(steps[-1])) == 6 + bias + residual
