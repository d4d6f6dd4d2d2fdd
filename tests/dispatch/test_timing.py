"""Timing: fair turns, percentiles, dense baselines that compute the same, and what is said about the machine."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import nn

from slimkernels import timing


def test_percentiles_interpolate():
    assert timing.percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(timing.Timing(1.8, 3.0, 4.2, 5))
    assert timing.percentiles([0.5]) == timing.Timing(0.5, 0.5, 0.5, 1)
    assert timing.Timing(0.001, 0.002, 0.003, 7).as_ms() == {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "n": 7}


def test_interleaved_takes_turns_and_tells_fast_from_slow():
    order: list[str] = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    measured = timing.interleaved({"slow": sleeper("slow", 0.012), "fast": sleeper("fast", 0.004)}, 0.0, min_rounds=4)
    assert list(measured) == ["slow", "fast"]
    assert measured["fast"].p50 < measured["slow"].p50
    assert 0.004 <= measured["fast"].p20 <= measured["fast"].p50 <= measured["fast"].p80
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches >= 5  # every round visits both, and the starting one alternates
    timed = measured["slow"].n + measured["fast"].n
    assert len(order) == timed + 2 + 8  # a first call each, then one untimed call a turn


def test_interleaved_spends_its_budget():
    start = time.perf_counter()
    timing.interleaved({"a": lambda: time.sleep(0.001)}, seconds=0.3, min_rounds=1)
    assert time.perf_counter() - start >= 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(({},), "at least one callable"), (({"a": int}, -1.0), "seconds >= 0"), (({"a": int}, 1.0, 0), "min_rounds >= 1")],
)
def test_interleaved_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        timing.interleaved(*arguments)


def small_net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    return model


def test_baselines_compute_what_the_model_does():
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
    model.train()
    baselines = timing.best_dense(model, x, compile=False)
    assert list(baselines) == ["eager channels_last", "eager contiguous"]
    for call in baselines.values():
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    assert model.training and isinstance(model[1], nn.BatchNorm2d)


def test_batch_norm_is_folded():
    folded = timing.fold_batch_norm(small_net())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_untraceable_model_keeps_its_batch_norm():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_net()

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = Branching()
    copied = timing.fold_batch_norm(model)
    assert copied is not model and not copied.training and isinstance(copied.body[1], nn.BatchNorm2d)


def test_a_compiler_that_fails_is_noted(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", broken)
    notes: list[str] = []
    baselines = timing.best_dense(small_net(), torch.randn(1, 3, 8, 8), note=notes.append)
    assert "compile" not in baselines
    assert notes == ["torch.compile baseline left out: RuntimeError: no C++ compiler"]


def test_compiled_baseline_is_not_recompiled_while_timed(monkeypatch):
    """inference_mode around the timing would invalidate the guards; a stand-in for torch.compile sees the mode."""
    modes: list[tuple[bool, bool]] = []

    def stand_in(model, **kwargs):
        def run(x):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return model(x)

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    baselines = timing.best_dense(small_net(), torch.randn(1, 3, 8, 8))
    timing.interleaved({"compile": baselines["compile"]}, seconds=0.0, min_rounds=1)
    assert len(modes) > 3 and set(modes) == {(False, False)}


def test_environment_says_where():
    data = timing.environment()
    assert data["torch"] == torch.__version__.split("+")[0] and data["threads"] == torch.get_num_threads()
    assert data["cpu"] and data["python"]
    assert (data["commit"] is None) == (data["dirty"] is None)
    assert data["commit"] is None or len(data["commit"]) == 40


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "slimkernels" / "timing.py"))
    data = timing.environment()
    assert data["commit"] is None and data["dirty"] is None


def test_a_reading_on_cuda_is_many_calls_between_two_synchronisations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small kernel's time is its own, not that of the synchronisation: readings are divided by their calls."""
    events: list[str] = []
    for name, fake in (
        ("is_available", lambda: True), ("is_initialized", lambda: True), ("synchronize", lambda: events.append("|")),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = [0.0]

    def call() -> None:
        clock[0] += 1e-5
        events.append(".")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.interleaved({"small": call}, seconds=0.0, min_rounds=1)["small"]
    assert found.p50 == pytest.approx(1e-5) and f"|{'.' * 100}|" in "".join(events)
