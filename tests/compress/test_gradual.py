"""Pruning while training: what each schedule does at which step, rewinding, state, and that masked weights stay 0."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels.compress.pruning import gradual
from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import apply_masks_, finalize_, mask_sparsity, masks, prune_
from slimkernels.compress.pruning.schedules import cubic_schedule
from slimkernels.formats import expand_mask


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 2, 6, 6, generator=generator), torch.randint(4, (6,), generator=generator)


def run(model, callback, steps, optimizer=None, *, begin=0, stop=None, seen=None):
    """The calls that the engine makes, in its order, over steps ``begin`` to ``stop``."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in range(begin, steps if stop is None else stop):
        callback.on_step_begin(step, steps, model)
        if seen is not None:
            seen.append(mask_sparsity(model))
        images, labels = batch(step)

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        closure()
        callback.on_gradients(step, steps, model)
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)
        callback.on_step_end(step, steps, model)
    return optimizer


def hidden(module: nn.Module) -> torch.Tensor:
    mask = module.parametrizations.weight[0]
    return ~expand_mask(mask.mask, mask.weight_shape, mask.block_shape)


def test_cubic_prunes_at_evenly_spaced_steps_along_the_curve():
    model, callback = net(), GradualPruning(0.75, (8, 1), begin=0.1, end=0.6, times=10)
    callback.prepare(model, 100)
    assert list(masks(model)) == ["3"] and mask_sparsity(model) == 0
    run(model, callback, 100)
    assert [step for step, _ in callback.history] == list(range(15, 61, 5))
    blocks = masks(model)["3"].mask.numel()
    for step, share in callback.history:
        wanted = cubic_schedule(step, final=0.75, begin=10, end=60)
        assert share == pytest.approx(math.floor(wanted * blocks + 1e-6) / blocks)
    assert mask_sparsity(model) == 0.75 and callback.metrics() == {"sparsity": 0.75}


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("linear", {"begin": 0.0, "end": 0.8, "times": 4}, [(10, 0.2), (20, 0.4), (30, 0.6), (40, 0.8)]),
        ("one_shot", {"begin": 0.5, "end": 0.8}, [(25, 0.8)]),
        ("iterative", {"begin": 0.2, "end": 0.8, "times": 3}, [(20, 0.415), (30, 0.658), (40, 0.8)]),
    ],
)
def test_other_schedules_prune_when_and_as_much_as_they_say(schedule, options, expected):
    model, callback = net(), GradualPruning(0.8, (1, 1), schedule=schedule, granularity="element", **options)
    callback.prepare(model, 50)
    run(model, callback, 50)
    assert [step for step, _ in callback.history] == [step for step, _ in expected]
    assert [share for _, share in callback.history] == pytest.approx([share for _, share in expected], abs=1e-3)


@pytest.mark.parametrize(("total", "begin", "end"), [(1, 0.0, 0.7), (2, 0.5, 1.0), (3, 0.9, 1.0), (7, 0.0, 1.0)])
@pytest.mark.parametrize("schedule", ["cubic", "linear", "iterative"])
def test_the_final_sparsity_is_reached_in_runs_shorter_than_the_schedule(schedule, total, begin, end):
    model, callback = net(), GradualPruning(0.5, (8, 1), schedule=schedule, begin=begin, end=end, times=20)
    callback.prepare(model, total)
    run(model, callback, total)
    assert mask_sparsity(model) == 0.5


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_masked_weights_are_zero_at_every_step_and_never_revive(name, granularity):
    model = net()
    callback = GradualPruning(0.75, (8, 1), begin=0.2, end=0.8, times=6, granularity=granularity)
    callback.prepare(model, 12)
    optimizer = OPTIMIZERS[name](model.parameters())
    dead = torch.zeros_like(model[3].weight, dtype=torch.bool)
    moved = False
    for step in range(12):
        run(model, callback, 12, optimizer, begin=step, stop=step + 1)
        now = hidden(model[3])
        assert not bool((dead & ~now).any()), "a masked weight was revived"
        dead = now
        assert bool((model[3].weight[dead] == 0).all())
        assert bool((model[3].parametrizations.weight.original[dead] == 0).all()), "the optimiser filled the Parameter"
        moved |= bool(dead.any())
    assert moved and mask_sparsity(model) == 0.75
    finalize_(model)
    assert bool((model[3].weight[dead] == 0).all()) and bool((model[3].weight[~dead] != 0).all())


def test_momentum_would_fill_the_parameter_without_the_callback():
    """The premise of the test above: gradients under a mask are zero, but momentum from before the mask is not."""
    model = net()
    optimizer = run(model, GradualPruning(0.0), 3)
    prune_(model, 0.5, (8, 1))
    optimizer.zero_grad()
    F.cross_entropy(model(batch(9)[0]), batch(9)[1]).backward()
    optimizer.step()
    original, dead = model[3].parametrizations.weight.original, hidden(model[3])
    assert bool((original[dead] != 0).any()) and bool((model[3].weight[dead] == 0).all())
    apply_masks_(model, optimizer)
    assert bool((original[dead] == 0).all())
    momentum = optimizer.state[original]["momentum_buffer"]
    assert bool((momentum[dead] == 0).all()) and bool((momentum[~dead] != 0).any())


def test_a_moving_average_of_the_model_keeps_the_zeros():
    from slimkernels.compress.training.ema import WeightAverage

    model, callback = net(), GradualPruning(0.75, (8, 1), end=0.5, times=4)
    callback.prepare(model, 10)
    average = WeightAverage(model, 0.99)
    optimizer = None
    for step in range(10):
        optimizer = run(model, callback, 10, optimizer, begin=step, stop=step + 1)
        average.update(model)
    average.copy_to(model)
    finalize_(model)
    assert (model[3].weight == 0).float().mean() == 0.75


@pytest.mark.parametrize("schedule", ["iterative", "one_shot"])
def test_rewinding_restores_early_values_under_the_new_mask(schedule):
    model = net()
    options = {"times": 2, "begin": 0.0, "end": 0.8} if schedule == "iterative" else {"begin": 0.8, "end": 0.9}
    callback = GradualPruning(0.75, (8, 1), schedule=schedule, rewind=0.2, **options)
    callback.prepare(model, 10)
    optimizer = run(model, callback, 10, stop=2)
    early = {name: value.detach().clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    optimizer = run(model, callback, 10, optimizer, begin=2, stop=8)
    assert bool((model[0].weight != early["0.weight"]).any())
    callback.on_step_begin(8, 10, model)
    dead = hidden(model[3])
    assert dead.float().mean() == 0.75
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked", "7.weight"):
        assert torch.equal(model.state_dict()[name], early[name]), name
    expected = torch.where(dead, 0.0, early["3.parametrizations.weight.original"])
    assert torch.equal(model[3].weight, expected)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "movement"])
def test_an_interrupted_run_ends_in_the_same_weights(importance):
    def make():
        return GradualPruning(
            0.75, (8, 1), schedule="iterative", begin=0.1, end=0.8, times=4, rewind=0.1, importance=importance
        )

    whole, callback = net(), make()
    callback.prepare(whole, 20)
    run(whole, callback, 20)

    half, callback = net(), make()
    callback.prepare(half, 20)
    optimizer = run(half, callback, 20, stop=11)
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict(), callback.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other, callback = net(seed=5), make()
    callback.prepare(other, 20)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    callback.load_state_dict(saved[2])
    run(other, callback, 20, optimizer, begin=11)
    assert len(callback.history) == 4
    for name, value in whole.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, other.state_dict()[name]), name


def test_taylor_prunes_what_the_gathered_gradients_say():
    model = net()
    callback = GradualPruning(0.5, schedule="one_shot", begin=0.5, end=0.9, importance="taylor", granularity="channel")
    callback.prepare(model, 4)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    model.eval()  # batch statistics would differ between the two passes
    expected = torch.zeros(16)
    for step in range(2):
        probe = copy.deepcopy(model)
        F.cross_entropy(probe(batch(step)[0]), batch(step)[1]).backward()
        weight = probe[3].parametrizations.weight.original
        expected += (weight * weight.grad).sum((1, 2, 3)).square() / 2
    run(model, callback, 4, frozen, stop=3)
    lowest = expected.argsort()[:8]
    filters = hidden(model[3]).flatten(1)
    assert bool(filters[lowest].all()) and int(filters.all(1).sum()) == 8 and int(filters.any(1).sum()) == 8


def test_ranks_take_the_masks_of_rank_0(monkeypatch):
    model, sent = net(), []

    def broadcast(flat, src):
        sent.append((flat.numel(), src))
        flat.copy_(torch.arange(flat.numel()) % 2)

    fake = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, broadcast=broadcast
    )
    monkeypatch.setattr(gradual, "distributed", fake)
    callback = GradualPruning(0.5, (8, 1), schedule="one_shot", begin=0.0)
    callback.prepare(model, 2)
    callback.on_step_begin(0, 2, model)
    mask = masks(model)["3"].mask
    assert sent == [(mask.numel(), 0)] and mask.flatten().tolist() == [i % 2 == 1 for i in range(mask.numel())]
    assert bool((model[3].parametrizations.weight.original[hidden(model[3])] == 0).all())


def test_a_dict_of_sparsities_and_block_shapes_follows_the_curve_by_layer():
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 4, 6, 6))
    callback = GradualPruning({"0": 0.5, "1": 0.75}, {"0": (8, 1), "1": (16, 4)}, end=0.5, times=2)
    callback.prepare(model, 4)
    for step in range(4):
        callback.on_step_begin(step, 4, model)
    found = masks(model)
    assert {name: mask.block_shape for name, mask in found.items()} == {"0": (8, 1), "1": (16, 4)}
    assert {name: float((~m.mask).float().mean()) for name, m in found.items()} == {"0": 0.5, "1": 0.75}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"begin": 0.5, "end": 0.5}, ValueError, r"expected 0 <= begin < end <= 1 and times >= 1, got begin=0.5"),
        ({"times": 0}, ValueError, r"times >= 1, got begin=0.0, end=0.7, times=0"),
        ({"schedule": "quadratic"}, ValueError, r"expected schedule 'cubic', .*, got 'quadratic'"),
        ({"sparsity": 1.0}, ValueError, r"GradualPruning: expected sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": {"a": -0.5}}, ValueError, r"GradualPruning: expected sparsity\['a'\] in \[0, 1\), got -0.5"),
        ({"rewind": 0.1}, ValueError, r"rewind of schedule 'iterative' or 'one_shot' alone"),
        ({"rewind": 0.2, "schedule": "iterative"}, ValueError, r"in \[0, 0.14\), before the first pruning; got rewind"),
        ({"importance": "fisher"}, ValueError, r"expected importance 'magnitude', .*, got 'fisher'"),
        ({"importance": "taylor", "schedule": "one_shot"}, ValueError, r"expected begin > 0, so that importance 'tay"),
        ({"granularity": "row"}, ValueError, r"expected granularity 'block', .*, got 'row'"),
        (
            {"exlude": "a"},
            TypeError,
            r"expected options of scope, costs, floor, layers, exclude, skip_first, got 'exlude'",
        ),
    ],
)
def test_bad_arguments_raise_at_once(options, error, message):
    with pytest.raises(error, match=message):
        GradualPruning(**options)


def test_an_unknown_layer_is_refused_before_training():
    with pytest.raises(ValueError, match=r"expected sparsity to match .*, got '33'; near matches: 3"):
        GradualPruning({"33": 0.5}).prepare(net(), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.75}, r"expected sparsity=0\.5 as in the checkpoint, got 0\.75"),
        ({"block_shape": (8, 1)}, r"expected block_shape=16, 1 as in the checkpoint, got 8, 1"),
        ({"end": 0.8}, r"expected end=0\.7 as"),
        ({"schedule": "linear"}, r"expected schedule=cubic as"),
        ({"exclude": ["3"]}, r"expected exclude=None as in the checkpoint, got 3"),
        ({"importance": torch.linalg.vector_norm}, r"expected importance=magnitude as .*, got linalg_vector_norm"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(options, message):
    state = GradualPruning(0.5).state_dict()
    with pytest.raises(ValueError, match=f"^GradualPruning: {message}"):
        GradualPruning(**{"sparsity": 0.5, **options}).load_state_dict(state)


def test_settings_that_mean_the_same_are_the_same():
    scores = {"3": torch.rand(2)}
    options = {"scope": "global", "layers": {"7", "3"}, "costs": {"3": 1.0, "7": 2.0}}
    state = GradualPruning(0.5, [16, 1], importance=scores, **options).state_dict()
    options |= {"layers": frozenset(("3", "7")), "costs": {"7": 2.5, "3": 1.0}}
    GradualPruning(np.float64(0.5), (16, 1), importance={"3": torch.rand(2)}, **options).load_state_dict(state)
    del state["settings"]  # a checkpoint from before there were any
    GradualPruning(0.25).load_state_dict(state)


def test_a_checkpoint_of_another_importance_is_refused():
    state = GradualPruning(importance="taylor").state_dict()
    with pytest.raises(ValueError, match=r"expected a checkpoint of importance 'magnitude', got another"):
        GradualPruning().load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected importance=taylor as in the checkpoint, got movement"):
        GradualPruning(importance="movement").load_state_dict(state)
    del state["settings"]
    with pytest.raises(ValueError, match=r"expected scores of kind 'movement', got 'taylor'"):
        GradualPruning(importance="movement").load_state_dict(state)
