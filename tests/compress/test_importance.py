"""Importance scores against their definitions, computed filter by filter and block by block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels.compress.pruning.granularity import Units
from slimkernels.compress.pruning.importance import GradientScores, movement_scores, taylor_scores, unit_scores
from slimkernels.compress.pruning.prune import masks, prune_


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(64, 4),
    ).double()  # fmt: skip


def loader(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.float64), torch.randint(4, (5,), generator=generator))
        for _ in range(count)
    ]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model = copy.deepcopy(model).eval()
    return [
        torch.autograd.grad(F.cross_entropy(model(images), labels), model[3].weight)[0] for images, labels in loader()
    ]


def test_taylor_is_the_mean_squared_sum_of_weight_times_gradient_over_a_block():
    model = net()
    weight = model[3].weight.detach()
    expected = torch.zeros(2, 72, dtype=torch.float64)
    for gradient in gradients(model):
        products = (weight * gradient).permute(0, 2, 3, 1).reshape(16, 72)
        expected += torch.stack([products[:8].sum(0), products[8:].sum(0)]).square() / 3
    found = taylor_scores(model, loader(), block_shape=(8, 1))
    assert list(found) == ["3"]
    torch.testing.assert_close(found["3"], expected)


def test_movement_is_minus_the_summed_product_over_a_filter():
    model = net()
    expected = sum(-(model[3].weight.detach() * g).sum((1, 2, 3)) for g in gradients(model))
    found = movement_scores(model, loader(), granularity="channel")
    torch.testing.assert_close(found["3"].flatten(), expected)


def test_first_order_taylor_predicts_the_loss_of_removing_a_filter():
    """The score is the square of the loss change to first order: exact in the limit of a small filter."""
    model = net().eval()
    with torch.no_grad():
        model[3].weight[5] *= 1e-6
    images, labels = loader(1)[0]
    score = taylor_scores(model, [(images, labels)], granularity="channel")["3"][5].item()
    before = F.cross_entropy(model(images), labels)
    with torch.no_grad():
        model[3].weight[5] = 0
    change = (F.cross_entropy(model(images), labels) - before).item()
    assert score == pytest.approx(change**2, rel=1e-3)


def test_scoring_leaves_the_model_as_it_was():
    model = net().train()
    prune_(model, 0.25, (8, 1))
    model[6].weight.requires_grad_(False)
    original = model[3].parametrizations.weight.original
    original.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    scores = taylor_scores(model, loader(), block_shape=(8, 1), layers="3", batches=2)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if torch.is_tensor(v))
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert not original.requires_grad
    assert bool((scores["3"][~masks(model)["3"].mask] == 0).all()), "a masked block has no gradient"


def test_one_shot_taylor_from_a_loader_equals_that_from_the_gradients_at_hand():
    by_loader, by_gradient = net().eval(), net().eval()
    batch = loader(1)
    prune_(by_loader, 0.5, (8, 1), importance=taylor_scores(by_loader, batch, block_shape=(8, 1)))
    F.cross_entropy(by_gradient(batch[0][0]), batch[0][1]).backward()
    prune_(by_gradient, 0.5, (8, 1), importance="taylor")
    assert torch.equal(masks(by_loader)["3"].mask, masks(by_gradient)["3"].mask)
    magnitude = masks(prune_(net(), 0.5, (8, 1)))["3"].mask
    assert not torch.equal(masks(by_loader)["3"].mask, magnitude)


def test_gathered_scores_add_up_and_survive_a_checkpoint():
    weight, units = torch.tensor([[2.0, 3.0]]), Units.of((1, 2), (1, 1), "block")
    steps = [torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 0.0]]), None]
    found = {}
    for kind in ("taylor", "movement"):
        gathered = GradientScores(kind)
        for i, gradient in enumerate(steps):
            if i == 1:
                again = GradientScores(kind)
                again.load_state_dict(gathered.state_dict())
                gathered = again
            gathered.add([("a", weight, gradient, units)])
        found[kind] = gathered.scores()["a"].tolist()
    assert found["taylor"] == [pytest.approx([(4 + 36) / 3, 9 / 3])]
    assert found["movement"] == [[-8.0, 3.0]]
    gathered.forget()
    with pytest.raises(ValueError, match=r"movement importance: expected gradients of at least one step, got none"):
        gathered.scores()


@pytest.mark.parametrize(("importance", "power"), [("magnitude", 2), ("magnitude_l1", 1)])
def test_magnitude_is_the_norm_of_the_whole_unit(importance, power):
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    units = Units.of(weight.shape, (3, 2), "block_shared_taps")
    got = unit_scores("op", "a", weight, None, units, importance)
    expected = weight.view(2, 3, 2, 2, 9).abs().pow(power).sum((1, 3, 4)).pow(1 / power)
    torch.testing.assert_close(got, expected)
    normalised = unit_scores("op", "a", weight, None, units, importance, per_weight=True)
    torch.testing.assert_close(normalised, expected / 54 ** (1 / power))


def test_a_callable_is_summed_over_the_taps_of_a_unit():
    weight = torch.randn(4, 4, 3, 3)
    units = Units.of(weight.shape, (4, 2), "block_shared_taps")
    got = unit_scores("op", "a", weight, None, units, lambda w, block: torch.arange(18.0).view(1, 18))
    assert got.tolist() == [[sum(range(0, 18, 2)), sum(range(1, 18, 2))]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: taylor_scores(net(), []), r"taylor_scores: expected at least one batch, got an empty loader"),
        (lambda: taylor_scores(net(), loader(), layers="9"), r"taylor_scores: expected layers to match .*, got '9'"),
        (lambda: taylor_scores(net(), loader(), exclude="*"), r"expected at least one Conv2d or Linear to score"),
        (lambda: GradientScores("magnitude"), r"expected kind 'taylor' or 'movement', got 'magnitude'"),
        (
            lambda: movement_scores(net(), [(loader()[0][0] * float("nan"), loader()[0][1])]),
            r"movement_scores: expected finite gradients in layer '3', got NaN",
        ),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
