"""Sparsity as a function of the step, closed forms: cubic, linear, one-shot, iterative."""

from __future__ import annotations

SCHEDULES = ("cubic", "linear", "one_shot", "iterative")


def cubic_schedule(step: int, *, final: float, begin: int = 0, end: int, initial: float = 0.0) -> float:
    """Sparsity at ``step`` by Zhu & Gupta (arXiv 1710.01878, eq. 1): fast at first, slow as few weights are left.

    ``final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3`` between ``begin`` and ``end``;
    ``initial`` before, ``final`` after.

    Raises:
        ValueError: end <= begin, or a sparsity outside [0, 1).
    """
    return final + (initial - final) * (1.0 - _progress("cubic_schedule", step, final, begin, end, initial)) ** 3


def linear_schedule(step: int, *, final: float, begin: int = 0, end: int, initial: float = 0.0) -> float:
    """Sparsity at ``step`` on the straight line from ``initial`` at ``begin`` to ``final`` at ``end``, constant
    outside.

    Raises:
        ValueError: end <= begin, or a sparsity outside [0, 1).
    """
    return final + (initial - final) * (1.0 - _progress("linear_schedule", step, final, begin, end, initial))


def one_shot_schedule(step: int, *, final: float, begin: int = 0, initial: float = 0.0) -> float:
    """``initial`` before ``begin``, ``final`` from there on.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """
    check_sparsity("one_shot_schedule", "final", final)
    check_sparsity("one_shot_schedule", "initial", initial)
    return final if step >= begin else initial


def iterative_schedule(round_: int, *, final: float, rounds: int, initial: float = 0.0) -> float:
    """Sparsity after ``round_`` of ``rounds`` prunings that each remove the same share of what is left.

    ``1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (round_ / rounds)``: iterative magnitude pruning of Frankle &
    Carbin (arXiv 1803.03635, section 1), whose every round prunes ``1 - (1 - final) ** (1 / rounds)`` of the survivors.
    Rounds below 0 and above ``rounds`` count as these.

    Raises:
        ValueError: ``rounds < 1``, or a sparsity outside [0, 1).
    """
    check_sparsity("iterative_schedule", "final", final)
    check_sparsity("iterative_schedule", "initial", initial)
    if rounds < 1:
        raise ValueError(f"iterative_schedule: expected rounds >= 1, got {rounds}")
    if round_ >= rounds:
        return final
    return 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** (max(round_, 0) / rounds)


def _progress(op: str, step: int, final: float, begin: int, end: int, initial: float) -> float:
    check_sparsity(op, "final", final)
    check_sparsity(op, "initial", initial)
    if end <= begin:
        raise ValueError(f"{op}: expected end > begin, got begin={begin}, end={end}")
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def check_sparsity(op: str, argument: str, sparsity: float) -> float:
    """The sparsity as a float.

    Raises:
        TypeError: not a number. ValueError: outside [0, 1); both begin with ``op`` and name ``argument``.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{op}: expected {argument} to be a number in [0, 1), got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{op}: expected {argument} in [0, 1), got {sparsity}")
    return float(sparsity)
