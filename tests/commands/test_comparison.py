"""Which baselines a converted network is compared with."""

import pytest

from slimkernels import timing
from slimkernels.cli import comparison


@pytest.fixture
def scripted(monkeypatch):
    """`timing.interleaved` gives the next of the listed seconds for each name; returns what was timed in each call."""

    def install(readings):
        calls = []

        def interleaved(callables, **budget):
            calls.append(list(callables))
            return {name: timing.percentiles([readings[name].pop(0)]) for name in callables}

        monkeypatch.setattr(timing, "interleaved", interleaved)
        return calls

    return install


def run(ours, baselines):
    said = []
    nothing = dict.fromkeys
    found = comparison.contest(nothing(ours), nothing(baselines), 1.0, lambda measured: [], said.append)
    return found, said


def test_baselines_far_from_the_fastest_are_timed_once(scripted):
    calls = scripted({"near": [1.04, 1.0], "fastest": [1.0, 1.1], "far": [2.0], "ours": [0.1]})
    (measured, others, left), said = run(["ours"], ["near", "fastest", "far"])
    assert calls == [["near", "fastest", "far"], ["near", "fastest", "ours"]]
    assert set(measured) == {"near", "fastest", "ours"} and others["far"].p50 == 2.0 and left == [] and said == []


def test_a_baseline_left_out_that_was_faster_than_the_rest_takes_part(scripted):
    """The quick reading of the others may have been lucky: the fastest reading of all must be one of the final run."""
    calls = scripted({"a": [1.0, 1.7, 1.6], "b": [1.5, 1.2], "c": [1.65, 1.3], "d": [3.0], "ours": [0.1, 0.1]})
    (measured, others, _), said = run(["ours"], ["a", "b", "c", "d"])
    assert calls == [["a", "b", "c", "d"], ["a", "ours"], ["a", "b", "c", "ours"]]
    assert measured["b"].p50 == 1.2 and set(others) == {"d"}
    assert said == ["measured again with b, c: faster before than what took part"]
