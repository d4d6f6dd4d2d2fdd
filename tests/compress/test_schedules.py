"""Sparsity schedules against their closed forms."""

from __future__ import annotations

import itertools

import pytest

from slimkernels.compress.pruning.schedules import (
    cubic_schedule,
    iterative_schedule,
    linear_schedule,
    one_shot_schedule,
)


def test_cubic_is_the_published_formula():
    assert cubic_schedule(0, final=0.8, begin=10, end=20, initial=0.2) == pytest.approx(0.2)
    assert cubic_schedule(15, final=0.8, begin=10, end=20, initial=0.2) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert cubic_schedule(99, final=0.8, begin=10, end=20, initial=0.2) == pytest.approx(0.8)
    # Zhu & Gupta, eq. 1, with their names: s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3
    s_i, s_f, t0, n, dt = 0.0, 0.875, 100, 50, 10
    for t in range(t0, t0 + n * dt + 1, dt):
        expected = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
        assert cubic_schedule(t, final=s_f, begin=t0, end=t0 + n * dt) == pytest.approx(expected, abs=1e-15)


def test_linear_is_a_line():
    values = [linear_schedule(step, final=0.8, begin=10, end=20, initial=0.2) for step in (0, 10, 15, 20, 99)]
    assert values == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])


def test_one_shot_is_a_step():
    assert [one_shot_schedule(step, final=0.8, begin=3, initial=0.1) for step in (0, 2, 3, 9)] == [0.1, 0.1, 0.8, 0.8]


def test_iterative_removes_the_same_share_of_the_survivors_each_round():
    densities = [1 - iterative_schedule(k, final=0.875, rounds=3) for k in range(4)]
    assert densities == pytest.approx([1, 0.5, 0.25, 0.125])
    densities = [1 - iterative_schedule(k, final=0.9, rounds=7, initial=0.2) for k in range(8)]
    ratios = [b / a for a, b in itertools.pairwise(densities)]
    assert ratios == pytest.approx([ratios[0]] * 7) and densities[0] == pytest.approx(0.8)
    assert iterative_schedule(7, final=0.9, rounds=7, initial=0.2) == 0.9
    assert iterative_schedule(-1, final=0.9, rounds=7, initial=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [cubic_schedule, linear_schedule])
def test_curves_never_fall_and_stay_between_their_ends(schedule):
    values = [schedule(step, final=0.9, begin=7, end=93, initial=0.3) for step in range(100)]
    assert values == sorted(values) and values[0] == pytest.approx(0.3) and values[-1] == pytest.approx(0.9)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"cubic_schedule: expected end > begin, got begin=5, end=5"):
        cubic_schedule(0, final=0.5, begin=5, end=5)
    with pytest.raises(ValueError, match=r"linear_schedule: expected final in \[0, 1\), got 1.0"):
        linear_schedule(0, final=1.0, end=5)
    with pytest.raises(ValueError, match=r"one_shot_schedule: expected initial in \[0, 1\), got -1"):
        one_shot_schedule(0, final=0.5, initial=-1)
    with pytest.raises(ValueError, match=r"iterative_schedule: expected rounds >= 1, got 0"):
        iterative_schedule(0, final=0.5, rounds=0)
    with pytest.raises(TypeError, match=r"iterative_schedule: expected final to be a number in \[0, 1\), got True"):
        iterative_schedule(0, final=True, rounds=2)
