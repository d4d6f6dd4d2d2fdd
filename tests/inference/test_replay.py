"""A recorded CPU model computes what the model computes, on fixed memory, for one input shape."""

from __future__ import annotations

import gc
import linecache
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PYTHONPATH
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.inference import GraphedModel, Replay
from slimkernels.inference import cpu_replay as replay_module
from slimkernels.inference.cpu_recording import Copies
from slimkernels.kernels.cpu.memory import own_copy
from slimkernels.nn import BlockSparseConv2d


def converted(*layers: nn.Module, sparsity: float = 0.75) -> nn.Module:
    """A small pruned net with random batch-norm statistics, converted wherever a kernel takes the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    sk.finalize_(sk.prune_(model, sparsity, (16, 1)))
    return sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))


def vgg_like() -> nn.Module:
    return converted(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def images(n: int = 2, c: int = 3, size: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_equal_the_models(batch: int, layout: torch.memory_format) -> None:
    model = vgg_like()
    replay = Replay(model, images(batch).contiguous(memory_format=layout))
    for seed in (2, 3):  # other values than those recorded, and nothing left over from the call before
        x = images(batch, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(replay(x), model(x), rtol=1e-5, atol=1e-5)


def sparse_conv(c_in: int, c_out: int, block: tuple[int, int], **options: Any) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, **options)
    columns = conv.kernel_size[0] * conv.kernel_size[1] * c_in
    return BlockSparseConv2d.from_dense(conv, block, torch.rand(c_out // block[0], columns) < 0.5)


def mixed() -> nn.Module:
    """Layers of torch's own and native ones, without a stopwatch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), sparse_conv(16, 16, (16, 1), kernel_size=3), nn.Flatten(),
        nn.LayerNorm(1600), nn.Linear(1600, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("write", ["in place", "through .data", "another storage", "state dict"])
def test_what_is_written_to_the_model_is_not_seen(write: str) -> None:
    """Packed weights, biases of native layers and the weights of torch's own ops, in every recording of a model."""
    model = mixed()
    served = sk.graphed(model, [images(2), images(1)], measure=False)
    x = images(2, seed=4)
    expected = served(x), served(x[:1])
    with torch.no_grad():
        if write == "state dict":
            changed = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
            model.load_state_dict(changed)
            model.eval()
        for parameter in model.parameters():
            if write == "in place":
                parameter.add_(1)
            elif write == "through .data":
                parameter.data.add_(1)
            elif write == "another storage":
                parameter.data = parameter.data + 1
        assert not torch.allclose(model(x), expected[0])
    assert torch.equal(served(x), expected[0]) and torch.equal(served(x[:1]), expected[1])


def test_recordings_share_one_copy_of_what_torch_reads() -> None:
    """With its strides: an expanded tensor stays small."""
    copies, table = Copies(), torch.randn(1, 3).expand(1000, 3)
    copied = copies.of(table)
    assert copied.stride() == table.stride() and torch.equal(copied, table)
    assert copied.untyped_storage().nbytes() == 12 and copied.data_ptr() != table.data_ptr()
    assert copies.of(table) is copied and copies.of(table[:2]) is not copied
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(own_copy(sparse).to_dense(), sparse.to_dense())


def test_an_example_that_comes_twice_is_two_inputs() -> None:
    model, x = Residual().eval(), images(2, 8)
    replay = Replay(model, (x, x))
    y = images(2, 8, seed=3)
    with torch.no_grad():
        expected = model(x, y)
    got = replay(x, y)
    for key in ("sum", "half", "view"):
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


def test_recorded_in_inference_mode_it_runs_in_any() -> None:
    model, x = vgg_like(), images(2, seed=5)
    with torch.inference_mode():
        served = sk.graphed(model, images())
        first = served(x)
    second = served(x)
    assert torch.equal(first, second) and first.is_inference() and not second.is_inference()


TALL = {"kernel_size": (70, 1), "padding": (35, 0)}  # more rows of taps than the kernels of images innermost take


@pytest.mark.parametrize(
    "layers",
    [
        [(4, 4, (1, 1), TALL), (4, 4, (1, 1), {"kernel_size": 1})],
        [(4, 16, (16, 1), TALL), (16, 4, (1, 1), {"kernel_size": 1})],
        [(4, 16, (16, 1), {"kernel_size": 3, "padding": 2**27, "dilation": 2**27})],
    ],
    ids=["single weights", "beside single weights", "taps far apart"],
)
def test_what_the_native_kernels_do_not_hold_runs_as_in_the_model(layers: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse_conv(*shape, **options) for *shape, options in layers)).eval()
    x = torch.randn(2, 4, 12, 3)
    with torch.no_grad():
        torch.testing.assert_close(Replay(model, x, measure=False)(x), model(x), rtol=1e-5, atol=1e-5)


class Cell(nn.Module):
    """Its output lies where one of its inputs was, once that was read."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(x) * y).sum(1, keepdim=True).expand(-1, 8, -1, -1) + 1


@pytest.mark.parametrize("first", [True, False])
def test_an_output_that_is_not_copied_may_be_an_input(first: bool) -> None:
    model = Cell().eval()
    replay = Replay(model, (images(2, 8), images(2, 8)), copy_outputs=False)
    expected = got = images(2, 8, seed=2)
    for seed in range(3, 6):
        x = images(2, 8, seed=seed)
        expected = model(expected, x) if first else model(x, expected)
        got = replay(got, x) if first else replay(x, got)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_output_that_is_not_copied_may_not_be_shared_with_another_process() -> None:
    """Torch moves its memory, in which the recording would go on, to a place of its own."""
    replay, x = Replay(vgg_like(), images(), copy_outputs=False), images(seed=2)
    replay(x).clone().share_memory_()
    expected = replay(x).clone()
    assert torch.equal(replay(x), expected)
    replay(x).share_memory_()
    assert replay._memory.data_ptr() != replay._workspace  # else the call would write to memory that is gone
    with pytest.raises(RuntimeError, match=r"expected the recording's memory where it was.* send a copy of the output"):
        replay(x)


def test_outputs_are_the_callers_own() -> None:
    replay = Replay(vgg_like(), images())
    first = replay(images(seed=2))
    kept = first.clone()
    replay(images(seed=3))
    assert torch.equal(first, kept) and not first.requires_grad


def test_graphed_serves_every_recorded_shape() -> None:
    model = vgg_like()
    served = sk.graphed(model, [(images(1),), (images(2),), (images(1),)], other_shapes="raise")
    assert isinstance(served, GraphedModel) and len(served.signatures) == 2
    with torch.no_grad():
        for n in (2, 1):
            torch.testing.assert_close(served(images(n, seed=8)), model(images(n, seed=8)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"GraphedModel: expected inputs \(float32\[1, 3, 12, 12\] on cpu\) or .* got"):
        served(images(3))
    with pytest.raises(TypeError, match="graphed: expected positional example inputs on the CPU, got keywords"):
        sk.graphed(model, {"input": images(1)})
    shared = sk.graphed(model, images(1), copy_outputs=False)
    assert shared(images(1)).data_ptr() == shared(-images(1)).data_ptr()


class Residual(nn.Module):
    """A branch that is read twice, a view that outlives its step, two outputs and one that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        a = self.first(x)
        half = a[:, :8]
        b = self.second(torch.relu(a)) + a
        c = self.third(b)
        return {"sum": c + b, "half": half + y, "view": c.flatten(1), "name": "residual"}


def test_branches_views_and_several_outputs() -> None:
    torch.manual_seed(0)
    model = Residual()
    sk.finalize_(sk.prune_(model, 0.5, (8, 1)))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))
    replay = Replay(fast, (images(2, 8), images(2, 8)))
    x, y = images(2, 8, seed=5), images(2, 8, seed=6)
    with torch.no_grad():
        expected = model(x, y)
    got = replay(x, y)
    assert list(got) == list(expected) and got.pop("name") == expected.pop("name")
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A ResNet's block; ``wide`` has a convolution in its short cut."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        c_in, stride = (16, 2) if wide else (32, 1)
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(c_in, 24, 3, stride, 1)
        self.second = nn.Conv2d(24, 32, 1)
        self.short_cut = nn.Conv2d(c_in, 32, 1, stride) if wide else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.first(x)))
        return self.relu(y + self.short_cut(x))


@pytest.mark.parametrize(("n", "block"), [(1, (16, 1)), (3, (8, 1)), (35, (16, 1)), (20, (1, 1))])
def test_a_residual_network_is_one_native_call(n: int, block: tuple[int, int]) -> None:
    """Channels last, images innermost with a rest, and blocks that know images innermost alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(True), Block(False), Block(False))
    sk.finalize_(sk.prune_(model, 0.5, block, layers=[n for n, m in model.named_modules() if type(m) is nn.Conv2d]))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0, measure=False))
    replay = Replay(fast, images(n))
    assert len(replay._steps) == 1
    x = images(n, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)
        x[0, 0, 3, 3] = torch.nan
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4, equal_nan=True)


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = torch.relu(x).chunk(2, dim=1)
        values, indices = (a - b).sort(dim=1)
        return values, indices, torch.var_mean(b, dim=1)[0]


def test_ops_of_several_outputs() -> None:
    x = images(2, 4, seed=7)
    for got, expected in zip(Replay(Chunks().eval(), images(2, 4))(x), Chunks()(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_intermediates_share_memory() -> None:
    """Of a chain of equal layers only an input and an output live at a time."""
    chain = converted(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(6)])
    replay = Replay(chain, images(4, 16))
    one = 4 * 16 * 12 * 12 * 4
    assert replay.workspace_bytes <= 2 * one + 64
    assert replay.weight_bytes >= sum(m.values.numel() * 4 for m in chain.modules() if hasattr(m, "values"))


def test_non_finite_inputs_do_not_stay_in_the_workspace() -> None:
    model = vgg_like()
    replay = Replay(model, images())
    assert not torch.isfinite(replay(torch.full_like(images(), float("nan")))).all()
    x = images(seed=4)
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-5, atol=1e-5)


def test_dense_and_low_rank_models_are_recorded_too() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4)
    ).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(Replay(dense, x)(x), dense(x), rtol=1e-5, atol=1e-5)
        sk.factorize_(dense, "svd", rank=3, layers=["0"])
        torch.testing.assert_close(Replay(dense, x)(x), dense(x), rtol=1e-5, atol=1e-5)


def test_torchs_thread_count_is_followed() -> None:
    model, x = vgg_like(), images()
    replay, before = Replay(model, x), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = replay(x)
        torch.set_num_threads(2)
        torch.testing.assert_close(replay(x), one, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_threads_that_share_a_recording_get_their_own_results() -> None:
    model = vgg_like()
    replay = Replay(model, images())
    inputs = [images(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(replay(inputs[i]), expected[i], rtol=1e-5, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_inputs_are_refused() -> None:
    replay = Replay(vgg_like(), images(2))
    with pytest.raises(ValueError, match=r"Replay: expected input 0 of shape \(2, 3, 12, 12\), got \(3, 3, 12, 12\)"):
        replay(images(3))
    with pytest.raises(TypeError, match=r"Replay: expected input 0 of torch\.float32 on cpu, got torch\.float64"):
        replay(images(2).double())
    with pytest.raises(ValueError, match="Replay: expected 1 inputs, got 2"):
        replay(images(2), images(2))


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


class ScaledByItem(nn.Module):
    """Scales its input by a number that is read of ``of``: its input or a buffer."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale if self.of == "buffer" else x.abs().max()).item()


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


def test_numbers_and_sizes_that_are_made_of_an_inputs_values_are_refused() -> None:
    x = images()
    head = "Replay: expected a model whose sizes and Python numbers are the same for all inputs of one shape, got one "
    with pytest.raises(ValueError, match=rf"^{head}that takes them from values of its inputs: aten\S+ in 'return x \*"):
        Replay(ScaledByItem("input").eval(), x)
    with pytest.raises(ValueError, match=rf"^{head}that takes them from values of its inputs: aten\S+ in 'return x\["):
        Replay(Selecting().eval(), x)
    torch.testing.assert_close(Replay(ScaledByItem("buffer").eval(), x)(images(seed=2)), 2 * images(seed=2))


def test_models_that_cannot_be_recorded_are_refused() -> None:
    x = images()
    with pytest.raises(ValueError, match="Replay: expected a model in eval mode"):
        Replay(nn.Sequential(nn.Dropout()).train(), x)
    with pytest.raises(ValueError, match="Replay: expected outputs that can be reproduced"):
        Replay(Drawing().eval(), x)
    with pytest.raises(
        ValueError, match=r"Replay: expected a model that changes nothing, got one that writes to \['calls'\]"
    ):
        Replay(Counting().eval(), x)
    with pytest.raises(ValueError, match=r"Replay: expected a model that torch\.export can capture"):
        Replay(Branching().eval(), x)
    with pytest.raises(TypeError, match="Replay: expected example inputs to be tensors, got str"):
        Replay(vgg_like(), ("x",))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda x: x[:1].expand(4, -1, -1, -1), lambda x: x[:, :, ::2, 1:8]])
def test_inputs_with_shared_elements_or_gaps(make) -> None:
    torch.manual_seed(0)
    model = converted(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    for served, example in ((model, make(images(4))), (nn.Sequential(nn.Flatten(), nn.ReLU()), make(images(4)))):
        replay, x = Replay(served.eval(), example), make(images(4, seed=2))
        with torch.no_grad():
            torch.testing.assert_close(replay(x), served(x), rtol=1e-5, atol=1e-5)


class Nothing(nn.Module):
    """Layers that see no image, and outputs without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.empty = nn.Conv2d(3, 16, 3), nn.Linear(16, 32), nn.Linear(32, 0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        rows = self.head(y.mean((2, 3)))
        return y[:0], self.conv(x[:0]), self.head(rows[:0, :16]), self.empty(rows), rows


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("n", [0, 1, 2])
def test_no_images_and_no_outputs_are_fine(n: int) -> None:
    torch.manual_seed(0)
    model = Nothing()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["conv", "head"]))
    replay = Replay(sk.convert(model.eval(), policy=sk.Policy(min_speedup=0)), images(n))
    with torch.no_grad():
        for got, want in zip(replay(images(n, seed=2)), model(images(n, seed=2)), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class NotFinite(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x > 0, x, torch.nan), torch.log(x.clamp_min(0))


def test_outputs_that_are_not_finite_are_compared_where_they_are() -> None:
    x = images()
    for got, want in zip(Replay(NotFinite().eval(), x)(x), NotFinite()(x), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    a = torch.tensor([1.0, torch.nan, torch.inf, 1000.0])
    assert replay_module._compare([a], [a + torch.tensor([0.5, 0, 0, 0])]) is None
    for wrong in ([torch.nan, torch.nan, torch.inf, 1000.0], [3.0, torch.nan, torch.inf, 1000.0], [1.0, 2.0]):
        assert replay_module._compare([3, a], [3, torch.tensor(wrong)]) == "output 1 of shape (4,)"
    assert replay_module._compare([torch.empty(0, 3)], [torch.empty(0, 3)]) is None


def test_a_recording_that_computes_something_else_is_told_from_a_model_that_does(monkeypatch) -> None:
    monkeypatch.setattr(Replay, "_call", lambda self, inputs: inputs[0] + 1)
    with pytest.raises(
        RuntimeError, match=r"Replay: the recording computes another output 0 of shape \(2, 3, 12, 12\)"
    ):
        Replay(nn.ReLU().eval(), images())
    with pytest.raises(ValueError, match=r"others in each call for output 0 .*random numbers"):
        Replay(Drawing().eval(), images())


def test_recordings_that_are_dropped_leave_nothing_behind() -> None:
    """No object, no text of generated code, no mapped memory grows with the number of recordings made."""

    def kept() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps")
        texts = sum(len(text) for text in torch.fx.graph_module._loader.eval_cache.values())
        lines = sum("eval_with_key" in key for key in linecache.cache)
        return texts, lines, len(maps.read_text().splitlines()) if maps.exists() else 0

    model, x = vgg_like(), images()
    Replay(model, x)
    before = kept()
    dropped = [weakref.ref(Replay(model, x)) for _ in range(3)]
    after = kept()
    assert before[:2] == after[:2] and after[2] <= before[2] + 3
    assert all(ref() is None for ref in dropped)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the resident memory")
def test_memory_is_flat_over_many_recordings() -> None:
    """In a process of its own: 0.1 MiB were lost in each, and pages come and go by a few MiB."""
    code = (
        "import gc, test_replay as t\n"
        "model, x = t.vgg_like(), t.images()\n"
        "def rss(): gc.collect(); return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "def many(n):\n"
        "    for _ in range(n): t.Replay(model, x)\n"
        "    return rss()\n"
        "first = many(30); print(many(60) - first)\n"
    )
    path = os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3, f"{done.stdout} MiB more after 60 recordings"
