"""Linear layers in a recording: rows are rows, whatever shape and strides they come in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.inference import Replay
from slimkernels.nn import BlockSparseLinear, LowRankLinear


class Rows(nn.Module):
    """Linear layers on (B, H, W, C), one behind a part of another's output, and convolutions before and behind them."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.first = nn.Sequential(nn.Linear(c, 64), nn.ReLU(), nn.Linear(64, c))
        self.part = nn.Linear(c // 2, 16)
        self.last = nn.Conv2d(c, 16, 1)
        self.across = nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x)
        rows = self.first(y.permute(0, 2, 3, 1))
        return rows, self.part(rows[..., 16:]), self.last(rows.permute(0, 3, 1, 2)), self.across(rows)


@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (3, 3, 12, 1), (0, 3, 12, 12)])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_layers_take_rows_of_any_shape(shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(0)
    model = Rows()
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=layers))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))
    torch.set_num_threads(threads)
    replay = Replay(fast, torch.randn(shape))
    assert (replay.weight_bytes > 0) == (shape[0] > 0)
    x = torch.randn(shape)
    with torch.no_grad():
        for got, want in zip(replay(x), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 7, 3), (2, 2, 3, 2), (0,), (0, 4, 4), (1, 1, 1)])
def test_linear_chains_take_rows_of_any_shape(lead: tuple[int, ...], dense: bool) -> None:
    """Two block-sparse layers, and a dense one that joins them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64), nn.Linear(64, 8))
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["0", "2"]))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0, dense_layers=not dense))
    examples = [torch.randn(*lead, 32)]
    if len(lead) == 3:
        examples += [examples[0].contiguous(memory_format=torch.channels_last), examples[0].transpose(0, 2)]
    for example in examples:
        replay = Replay(fast, example)
        x = torch.randn_like(example)
        with torch.no_grad():
            torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)
        assert replay(x).stride() == fast(x).stride()
        if x.numel():
            assert replay.calls == 3 and replay.weight_bytes > 0, "one chain"


class PartOfRows(nn.Module):
    def __init__(self, part: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.second, self.part = nn.Linear(32, 64), nn.Linear(width, 16), part

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.part(self.first(x)))


@pytest.mark.parametrize(
    ("n", "width", "part"),
    [(4, 64, lambda y: y[1:]), (4, 64, lambda y: y[:2]), (1, 32, lambda y: y[:, 32:]),
     (4, 32, lambda y: y.view(-1, 32)), (4, 64, lambda y: y.view(2, 2, 64)),
     (4, 64, lambda y: y.view(2, 2, 64).transpose(0, 1))],
)  # fmt: skip
def test_a_layer_that_reads_a_part_or_another_order_of_rows(n: int, width: int, part) -> None:
    torch.manual_seed(0)
    model = PartOfRows(part, width)
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["first", "second"]))
    replay = Replay(sk.convert(model.eval(), policy=sk.Policy(min_speedup=0)), torch.randn(n, 32))
    x = torch.randn(n, 32)
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)


class Residuals(nn.Module):
    """Blocks of linear layers with short cuts: the chain adds its input to a value inside, and that to its output."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in (self.layers[:2], self.layers[2:]):
            x = torch.relu(second(torch.relu(first(x))) + x)
        return x


def block_sparse() -> nn.Module:
    return BlockSparseLinear.from_dense(nn.Linear(32, 32), (16, 1), torch.rand(2, 32) < 0.5)


@pytest.mark.parametrize("layer", [block_sparse, lambda: LowRankLinear.from_dense(nn.Linear(32, 32), 4)])
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3), (40,)])
def test_linear_layers_with_short_cuts_are_one_chain(lead: tuple[int, ...], layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Residuals(layer).eval()
    replay = Replay(model, torch.randn(*lead, 32), measure=False)
    x = torch.randn(*lead, 32)
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(replay.chains) == 1
