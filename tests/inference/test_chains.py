"""Chains of native layers in a recording: pieces of the batch, layouts, memory, and the same outputs as the model's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.conversion.spread import Seconds
from slimkernels.inference import Replay, batches, chain_forms
from slimkernels.kernels.cpu import chain as chains
from slimkernels.kernels.cpu import pairs
from slimkernels.kernels.cpu.chain import Form
from slimkernels.kernels.cpu.layouts import CHANNELS_LAST, Layout
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.cpu.pieces import Piece, image_by_image, pieces
from slimkernels.kernels.problems import LANES
from slimkernels.nn import BlockSparseConv2d

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


@given(st.integers(1, 200), st.sampled_from([1, 4, 8, 16]), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_pieces_cover_the_batch_once(n: int, lanes: int, threads: int) -> None:
    cut = pieces(n, lanes, threads)
    assert [p.start for p in cut] == [sum(p.count for p in cut[:i]) for i in range(len(cut))]
    assert sum(p.count for p in cut) == n and all(p.count > 0 for p in cut)
    assert all(-1 <= p.slot < threads and p.lanes in (1, lanes) for p in cut)
    # Those alone on a thread come first, one vector each, and every slot has as many.
    alone = [p for p in cut if p.slot >= 0]
    assert cut[: len(alone)] == alone and all(p.count <= lanes for p in alone)
    assert len({sum(p.slot == s for p in alone) for s in range(threads)}) == 1
    # Half-empty vectors are not worth it.
    assert all(p.count >= 0.75 * lanes for p in cut if p.lanes > 1)


def test_pieces_by_value() -> None:
    assert pieces(16, 16, 2) == [Piece(0, 16, 16, -1)]
    assert pieces(32, 16, 2) == [Piece(0, 16, 16, 0), Piece(16, 16, 16, 1)]
    assert pieces(20, 16, 1) == [Piece(0, 16, 16, -1), Piece(16, 4, 1, -1)]
    assert pieces(45, 16, 2) == [Piece(0, 16, 16, 0), Piece(16, 16, 16, 1), Piece(32, 13, 16, -1)]
    assert pieces(48, 16, 8) == [Piece(0, 48, 16, -1)]
    assert pieces(100, 1, 2) == [Piece(0, 100, 1, -1)]


@given(st.integers(1, 200), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_single_images_cover_the_batch_once(n: int, threads: int) -> None:
    cut = image_by_image(n, threads)
    assert [(p.start, p.count, p.lanes) for p in cut] == [(i, 1, 1) for i in range(n)]
    # Every slot has as many images, and those that all threads share come last.
    alone = [p.slot for p in cut if p.slot >= 0]
    assert [p.slot for p in cut[: len(alone)]] == alone and n - len(alone) < max(threads, n * (threads == 1) + 1)
    assert len({alone.count(slot) for slot in range(threads)}) == 1


class Joined(nn.Module):
    """A residual, a ReLU that several layers share, pooling, and rows at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.short_cut, self.last, self.relu = nn.Conv2d(16, 16, 1), nn.Linear(16, 24), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x) + self.short_cut(x)) + x
        return self.last(x.permute(0, 2, 3, 1))


def joined() -> nn.Module:
    torch.manual_seed(0)
    model = Joined()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["first", "second", "short_cut", "last"]))
    return sk.convert(model.eval(), policy=sk.Policy(min_speedup=0, measure=False))


def test_the_first_form_follows_from_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image by image where the batch does not fit the caches; vectors of images where they fill up."""
    monkeypatch.setenv("SLIMKERNELS_ISA", ISAS[-1])
    torch.set_num_threads(2)
    fast = joined()

    def form(n: int) -> str:
        """Of the chain of the second layer and its short cut, which reads, adds and writes 16 channels."""
        return Replay(fast, torch.randn(n, 3, 6, 6), measure=False).chains[1][1]

    monkeypatch.setattr(chains, "_BYTES_IN_CACHE", 3 * 4 * 6 * 6 * (16 + 16 + 16))
    assert [form(n) for n in (1, 3, 4)] == ["whole batch", "whole batch", "image by image"]
    monkeypatch.setattr(chains, "_MACS_PER_COPY", 0)
    monkeypatch.setattr(chains, "_STORED_SHARE_WHOLE", 1.1)
    assert form(LANES[ISAS[-1]]) == "vectors of images"


@pytest.mark.parametrize("isa", ISAS)
def test_with_avx2_dense_chains_lie_channels_last(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a share of stored multiply-adds on: here 45 of 288 at 16 pixels, and 9 of 16 at the 4 behind the pooling."""
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    monkeypatch.setattr(chains, "_MACS_PER_COPY", 0)
    torch.manual_seed(0)
    wide, narrow = torch.arange(288).view(1, -1) < 45, torch.arange(16).view(1, -1) < 9
    net = nn.Sequential(
        BlockSparseConv2d.from_dense(nn.Conv2d(32, 16, 3, padding=1), (16, 1), wide, epilogue="relu_maxpool2"),
        BlockSparseConv2d.from_dense(nn.Conv2d(16, 16, 1), (16, 1), narrow),
    ).eval()
    share = (45 * 16 + 9 * 4) / (288 * 16 + 16 * 4)
    n = 2 * LANES[isa]
    for limit, whole in ((share - 1e-9, isa == "avx2"), (share + 1e-9, False)):
        monkeypatch.setattr(chains, "_STORED_SHARE_WHOLE", limit)
        replay = Replay(net, torch.randn(n, 32, 4, 4), measure=False)
        assert [name for _, name in replay.chains] == ["whole batch" if whole else "vectors of images"]


@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_every_form_computes_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 on the engine that runs everywhere."""
    monkeypatch.setattr(pairs, "fast_engines", lambda: ("scalar",))
    monkeypatch.setattr(batches, "may_be_in_bf16", lambda _: True)  # what a recording is compared with
    fast, x, found = joined(), torch.randn(n, 3, 6, 6), []
    for form in Form:
        torch.set_num_threads(2)
        monkeypatch.setattr(chains, "forms", lambda *_, form=form: [form])
        replay = Replay(fast, torch.randn(n, 3, 6, 6), measure=False)
        assert {name for _, name in replay.chains} == {form.value} and form.value in repr(replay)
        found.append(replay(x))
        torch.set_num_threads(1)
        assert torch.equal(replay(x), found[-1]), "whatever the number of threads"
    with torch.no_grad():
        want = fast(x)
    for form, got in zip(Form, found, strict=True):
        bound = 3e-2 if form is Form.BF16 else 1e-5
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def test_another_form_is_taken_only_where_it_is_surely_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, noisy = Seconds([1.0, 1.01, 1.0, 1.02, 1.0]), Seconds([1.0, 3.0, 0.7, 2.0, 1.4])
    slower, little, much = Seconds([1.5] * 5), Seconds([0.98] * 5), Seconds([0.8] * 5)
    assert chain_forms.faster([steady, slower, little]) == 0
    assert chain_forms.faster([steady, slower, much]) == 2
    assert chain_forms.faster([noisy, Seconds([0.95, 2.0, 0.75, 1.9, 1.2]), slower]) == 0
    assert chain_forms.faster([steady, much, Seconds([0.5] * 5), little]) == 2


def test_measured_forms_are_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that calls the modules' way twice as fast, then one that calls it twice as slow."""
    fast, x = joined(), torch.randn(4, 3, 6, 6)
    torch.set_num_threads(2)
    asked: list[int] = []

    def clock(times: float):
        def seconds(runs, **_) -> list[float]:
            asked.append(len(runs))
            return [times if isinstance(run, chain_forms.ModuleByModule) else 1.0 for run in runs]

        return seconds

    monkeypatch.setattr(chain_forms, "typical_seconds", clock(0.5))
    monkeypatch.setattr(chain_forms, "_SHORTEST_MEASURED_S", 1e9)
    usual = Replay(fast, x)
    assert asked == [], "too short to measure"
    monkeypatch.setattr(chain_forms, "_SHORTEST_MEASURED_S", 0.0)
    as_modules = Replay(fast, x)
    assert len(asked) == len(usual.chains) and {form for _, form in as_modules.chains} == {"module by module"}
    monkeypatch.setattr(chain_forms, "typical_seconds", clock(2.0))
    assert Replay(fast, x).chains == usual.chains
    asked.clear()
    assert Replay(fast, x, measure=False).chains == usual.chains
    assert repr(sk.graphed(fast, x, measure=False)).count("whole batch") == 1 and asked == []
    with torch.no_grad():
        torch.testing.assert_close(as_modules(x), fast(x), rtol=1e-4, atol=1e-4)


def net() -> nn.Module:
    """Convolutions with a fused pool, one-pixel images that are flattened, two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16),
    )  # fmt: skip
    sk.finalize_(sk.prune_(model, 0.5, (16, 1)))
    return sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))


def low_rank_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8),
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(),
    )  # fmt: skip
    sk.factorize_(model, "tai", rank=8, layers=["0", "2"])
    sk.factorize_(model, "svd", rank=16, layers=["6"])
    return sk.convert(model.eval(), policy=sk.Policy(min_speedup=0, merge_low_rank=False))


class SingleWeights(nn.Module):
    """Images of 8x8 to 2x2 pixels, a residual, and a linear layer: each size is cut into other parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.relu, self.last = nn.ReLU(), nn.Linear(64, 24)
        self.pooled = nn.Sequential(
            nn.Conv2d(24, 40, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(40, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x) + x)
        return self.last(self.pooled(x))


def single_weights() -> nn.Module:
    torch.manual_seed(0)
    model = SingleWeights()
    sk.finalize_(sk.prune_(model, 0.6, (1, 1)))
    policy = sk.Policy(min_speedup=0, measure=False, check_model=False, block_shapes=((1, 1),))
    return sk.convert(model.eval(), example_inputs=(batch(1),), policy=policy)


def pooled_net(block: tuple[int, int]) -> nn.Module:
    """Pools of several kinds between convolutions, the first of which is dense, and rows behind the last."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, padding=2), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(24, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    sk.finalize_(sk.prune_(model, 0.6, block, layers=["2", "5", "8"]))
    policy = sk.Policy(min_speedup=0, measure=False, check_model=False, block_shapes=((16, 1), block))
    return sk.convert(model.eval(), example_inputs=(batch(1),), policy=policy)


def blocks_between_pools() -> nn.Module:
    return pooled_net((16, 1))


def weights_between_pools() -> nn.Module:
    return pooled_net((1, 1))


@pytest.mark.usefixtures("innermost_first")
@pytest.mark.parametrize("block", [(16, 1), (1, 1)])
def test_poolings_are_layers_of_a_chain(block: tuple[int, int], monkeypatch, threads) -> None:
    """One chain from the first convolution to the last linear layer, in every form that it may take."""
    monkeypatch.setenv("SLIMKERNELS_ISA", ISAS[-1])
    threads(2)
    model, found = pooled_net(block), set()
    for n in (1, LANES[ISAS[-1]] + 3):
        x = batch(n)
        replay = Replay(model, x, measure=False)
        assert [layers for layers, _ in replay.chains] == [8] and len(replay._steps) == 1
        found.add(replay.chains[0][1])
        with torch.no_grad():
            torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(found) == 2, found


def test_a_pooling_begins_no_chain_and_is_none() -> None:
    model = pooled_net((16, 1))
    assert Replay(nn.Sequential(model[4], nn.ReLU()).eval(), torch.randn(1, 16, 8, 8)).chains == []
    replay = Replay(nn.Sequential(model[4], model[5]).eval(), torch.randn(1, 16, 8, 8), measure=False)
    assert [layers for layers, _ in replay.chains] == [1]


def test_a_relu_behind_a_pooling_stays_torchs() -> None:
    model = nn.Sequential(pooled_net((16, 1))[:5], nn.ReLU()).eval()
    x = batch(2)
    replay = Replay(model, x, measure=False)
    assert [layers for layers, _ in replay.chains] == [3]
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)


def batch(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("innermost_first")
@pytest.mark.parametrize("make", [net, low_rank_net, blocks_between_pools, weights_between_pools])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 5, 16, 21, 48])
def test_a_recording_computes_what_the_model_does(make, isa: str, n: int, monkeypatch, threads) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    model = make()
    for count in (1, 2, 3):
        threads(count)
        replay = Replay(model, batch(n))
        for seed in (2, 3):
            x = batch(n, seed)
            with torch.no_grad():
                torch.testing.assert_close(replay(x), model(x), rtol=1e-4, atol=1e-4)
        # Recorded with one number of threads, run with another.
        threads(2)
        with torch.no_grad():
            torch.testing.assert_close(replay(batch(n, 4)), model(batch(n, 4)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_few_images_run_in_parts(isa: str, monkeypatch, threads) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    model = single_weights()
    for n in (1, 3):
        threads(2)
        replay = Replay(model, batch(n), measure=False)
        in_parts = n <= LANES[isa] // 2
        assert replay.chains[0] == (4, "parts of images" if in_parts else "vectors of images")
        # With eight parts and more, 4x4 pixels that are pooled are cut into fewer parts than those before: two copies.
        assert replay.calls == 10 + 2 * (n == 1 and LANES[isa] >= 8)
        x = batch(n, 2)
        with torch.no_grad():
            got = replay(x).clone()
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
        threads(1)
        assert torch.equal(replay(x), got)


def test_residuals_in_other_parts_keep_images_whole(monkeypatch) -> None:
    """A residual is added as it lies, so that its parts have to be those of the sums."""
    links = [chains.Link(None, 0), chains.Link(None, 1, 0), chains.Link(None, 2)]  # type: ignore[arg-type]
    quarters, halves, whole = (Layout(8, parts) for parts in ((2, 2), (1, 2), (1, 1)))
    assert chains._takes_parts(links, [quarters, quarters, whole], 1)
    assert not chains._takes_parts(links, [quarters, halves, whole], 1)
    assert not chains._takes_parts(links, [CHANNELS_LAST, quarters, whole], 1)
    assert not chains._takes_parts(links, [whole] * 3, 1)


@pytest.mark.usefixtures("innermost_first")
def test_the_whole_network_is_one_call(monkeypatch, threads) -> None:
    threads(1)
    isa = ISAS[-1]
    lanes = LANES[isa]
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    replay = Replay(net(), batch(lanes))
    # Six layers between two copies; the flattened view between them is no step.
    assert len(replay._steps) == 1 and replay.calls == 6 + 2
    # Where copying costs more than the layout saves, the layers stay channels last.
    monkeypatch.setattr(chains, "_MACS_PER_COPY", 10**9)
    assert Replay(net(), batch(lanes)).calls == 6


@pytest.mark.usefixtures("innermost_first")
def test_pieces_share_a_workspace(monkeypatch, threads) -> None:
    """Eight pieces in two slots take the memory of two."""
    threads(2)
    lanes = LANES[ISAS[-1]]
    monkeypatch.setenv("SLIMKERNELS_ISA", ISAS[-1])
    model = net()
    # Unmeasured: on a busy machine another form may be faster, which has another workspace.
    two, eight = (Replay(model, batch(k * lanes), measure=False).workspace_bytes for k in (2, 8))
    ends = 4 * 6 * lanes * (3 * 64 + 16)  # what the model reads and returns, of six pieces more
    assert eight <= two + ends + 4096


class TwoHeads(nn.Module):
    """A layer that two others read, and one that an addition reads: no chain may swallow it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(32, 32, 3, padding=1)
        self.right = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.stem(x)
        right = self.right(stem)
        return self.last(self.left(stem) + right), right.flatten(1)


@pytest.mark.usefixtures("innermost_first")
@pytest.mark.parametrize("n", [2, 16, 40])
def test_values_that_others_read_stay_where_they_are(n: int, monkeypatch) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1)))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))
    replay = Replay(fast, batch(n))
    with torch.no_grad():
        for got, want in zip(replay(batch(n, 5)), model(batch(n, 5)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("innermost_first")
@pytest.mark.parametrize("n", [1, 3, 16, 40])
def test_dense_linear_layers_behind_native_ones_join_them(n: int, monkeypatch) -> None:
    """A classifier that stayed dense, with ReLUs and without, runs in the same call."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48, bias=False), nn.Linear(48, 10),
    )  # fmt: skip
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["0", "2"]))
    policy = sk.Policy(min_speedup=0, dense_layers=False)
    fast = sk.convert(model.eval(), policy=policy)
    assert isinstance(fast[5], nn.Linear), "the classifier stayed dense"
    replay = Replay(fast, batch(n))
    assert len(replay._steps) == 1
    for seed in (2, 3):
        with torch.no_grad():
            torch.testing.assert_close(replay(batch(n, seed)), model(batch(n, seed)), rtol=1e-4, atol=1e-4)


def test_a_relu_that_shares_its_linear_layer_stays_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 16, 8), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(self.conv(x).flatten(1))
            return self.second(torch.relu(y)), y

    torch.manual_seed(0)
    model = Both()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["conv"]))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0, dense_layers=False))
    for got, want in zip(Replay(fast, batch(4))(batch(4, 2)), model(batch(4, 2)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_dense_network_stays_with_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(5, 32)
    replay = Replay(model, x)
    assert replay.weight_bytes == 0 and len(replay._steps) == 3
    torch.testing.assert_close(replay(x), model(x))


class Attention(nn.Module):
    """A linear layer whose weight follows from the input, and one whose weight is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(1)
        z = nn.functional.linear(y, y.t() @ y)
        return nn.functional.linear(z, z)


def test_weights_that_follow_from_the_input_are_not_packed() -> None:
    torch.manual_seed(0)
    model = Attention()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["conv"]))
    fast = sk.convert(model.eval(), policy=sk.Policy(min_speedup=0))
    replay = Replay(fast, batch(5))
    for seed in (2, 3):
        torch.testing.assert_close(replay(batch(5, seed)), model(batch(5, seed)), rtol=1e-3, atol=1e-3)
