"""The sensitivity scan against pruning by hand, resuming, and the budget against a grid search."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels.compress.pruning.prune import finalize_, masks, prune_
from slimkernels.compress.pruning.sensitivity import SensitivityReport, sensitivity_scan


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def loader(count: int = 2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 6, 6, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(count)
    ]


class Counted:
    """A loader that counts its passes and fails at one of them."""

    def __init__(self, batches, fail_at=None):
        self.batches, self.fail_at, self.passes = batches, fail_at, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        if self.passes == self.fail_at:
            raise KeyboardInterrupt
        return iter(self.batches)


def test_the_scan_measures_each_layer_pruned_alone_and_leaves_the_model_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    report = sensitivity_scan(model, loader(), (0.75, 0.5), (8, 1))
    assert report.sparsities == (0.5, 0.75) and report.weights == {"3": 1152, "5": 128}
    assert masks(model) == {} and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    for name, shares in (("3", {"3": 0.75}), ("5", {"5": 0.5}), (None, None)):
        probe = copy.deepcopy(model).eval()
        if shares is not None:
            finalize_(prune_(probe, shares, (8, 1)))
        logits = probe(images)
        loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
        index = {"3": 1, "5": 0, None: None}[name]
        got = (
            (report.loss, report.accuracy)
            if name is None
            else (report.losses[name][index], report.accuracies[name][index])
        )
        assert got == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy))
    assert "50.0%" in str(report) and str(report).count("\n") == 3
    assert json.loads(json.dumps(report.to_json()))["layers"]["5"]["weights"] == 128


def test_an_interrupted_scan_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "scan" / "scan.json"
    whole = Counted(loader())
    expected = sensitivity_scan(net(), whole, (0.5, 0.75), (8, 1))
    assert whole.passes == 5
    with pytest.raises(KeyboardInterrupt):
        sensitivity_scan(net(), Counted(loader(), fail_at=5), (0.5, 0.75), (8, 1), path=path)
    rest = Counted(loader())
    assert sensitivity_scan(net(), rest, (0.5, 0.75), (8, 1), path=path) == expected
    assert rest.passes == 2, "the layer that was interrupted is measured again, nothing else"
    done = Counted(loader())
    assert sensitivity_scan(net(), done, (0.5, 0.75), (8, 1), path=path) == expected and done.passes == 0
    other = net()
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1
    for model, shares in ((other, (0.5, 0.75)), (net(), (0.5,))):
        with pytest.raises(
            ValueError, match=r"expected the unfinished scan of this model in .*scan.json, got none: it "
        ):
            sensitivity_scan(model, loader(), shares, (8, 1), path=path)
    data = path.read_text()
    digit = next(i for i in range(data.index("layers"), len(data)) if data[i] in "123")
    path.write_text(data[:digit] + "4" + data[digit + 1 :])
    with pytest.raises(ValueError, match="its values are not those of its SHA-256"):
        sensitivity_scan(net(), loader(), (0.5, 0.75), (8, 1), path=path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"expected the unfinished scan of this model"):
        sensitivity_scan(net(), loader(), (0.5, 0.75), (8, 1), path=path)


def report(losses: dict[str, tuple[float, ...]], weights: dict[str, int]) -> SensitivityReport:
    return SensitivityReport(0.9, 1.0, (0.25, 0.5, 0.75), dict.fromkeys(weights, (0.9,) * 3), losses, weights)


def test_the_budget_takes_the_cheapest_layers_and_reaches_the_target():
    scan = report({"a": (1.0, 1.0, 1.0), "b": (1.1, 1.3, 2.0), "c": (3.0, 4.0, 5.0)}, {"a": 400, "b": 400, "c": 200})
    assert scan.budget(0.3) == {"a": 0.75, "b": 0.0, "c": 0.0}
    shares = scan.budget(0.5)
    assert shares == {"a": 0.75, "b": 0.5, "c": 0.0}
    assert scan.predicted_loss(shares) == pytest.approx(1.3)
    assert scan.budget(0.75) == {"a": 0.75, "b": 0.75, "c": 0.75}
    with pytest.raises(ValueError, match=r"budget: expected sparsity of at most 0.75, the highest scanned, got 0.8"):
        scan.budget(0.8)
    with pytest.raises(ValueError, match=r"budget: expected sparsity in \[0, 1\), got 1.5"):
        scan.budget(1.5)
    with pytest.raises(ValueError, match=r"predicted_loss: expected scanned layers .*, got 'z': 0.1"):
        scan.predicted_loss({"z": 0.1})


def test_no_grid_point_of_the_same_total_is_cheaper_than_the_budget():
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        rises = torch.rand(3, 3, generator=generator).cumsum(1)  # dips below the hull are possible: not convex
        weights = {"a": 100, "b": 300, "c": 200}
        scan = report({n: tuple((1 + r).tolist()) for n, r in zip(weights, rises, strict=True)}, weights)
        best = scan.predicted_loss(scan.budget(0.4))
        grid = [i / 20 for i in range(16)]
        for a, b in itertools.product(grid, grid):
            c = (0.4 * 600 - 100 * a - 300 * b) / 200
            if 0 <= c <= 0.75:
                assert best <= scan.predicted_loss({"a": a, "b": b, "c": c}) + 1e-9


def test_a_scanned_budget_prunes_to_the_target():
    model = net()
    shares = sensitivity_scan(model, loader(), (0.5, 0.75), (8, 1)).budget(0.6)
    prune_(model, shares, (8, 1))
    zeros = sum(int((model[i].weight == 0).sum()) for i in (3, 5))
    assert zeros / 1280 == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": (0.5, 1.0)}, r"sensitivity_scan: expected sparsities in \[0, 1\), got 1.0"),
        ({"sparsities": ()}, r"sensitivity_scan: expected at least one sparsity above 0, got \(\)"),
        ({"layers": "conv"}, r"sensitivity_scan: expected layers to match .*, got 'conv'"),
        ({"loader": []}, r"sensitivity_scan: expected at least one sample, got an empty loader"),
        ({"exclude": "*"}, r"sensitivity_scan: expected at least one Conv2d or Linear to scan, got none"),
        ({"loader": [(torch.full((1, 1, 6, 6), float("nan")), torch.zeros(1, dtype=torch.int64))]}, r"loss, got NaN"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity_scan(net(), **{"loader": loader(1), **arguments})
