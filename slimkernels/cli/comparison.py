"""Speed-ups of whole networks that can be believed: with their spread, and measured again where they look wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from slimkernels import timing
from slimkernels.conversion.spread import EXPLAINED, Ratio, ratio_of_medians

# The threads of ONNX Runtime, OpenVINO and OpenMP go on spinning for a while after a call and would share the cores
# with whatever comes next, so a turn begins with a pause; and with untimed calls, since cores wake up and the other
# side has just evicted the caches. A baseline that is FAR from the fastest is left out after a quick reading: ONNX
# Runtime's threads, once awake, spin for longer than the pause.
PAUSE_S, SETTLE_S, FAR = 0.02, 0.005, 1.05

# A comparison whose limits lie further apart says little, and one in doubt is measured so often, longer each time.
_WIDE = 1.5
_ATTEMPTS = 3


def speedup(slow: timing.Timing, fast: timing.Timing) -> Ratio:
    """The median time of ``slow`` over that of ``fast``, both from one call of `timing.interleaved`."""
    return ratio_of_medians(slow.p50, fast.p50, slow.rounds, fast.rounds)


def believable_speedup(dense: nn.Module, compressed: nn.Module) -> float:
    """The largest speed-up that is believed without another look: four times what the best layer's saved work explains.

    Args:
        dense: the uncompressed network.
        compressed: its pruned or factorized twin, zeros as such, not converted; layers have the names of ``dense``.
    """
    layers = dict(compressed.named_modules())
    saved = 1.0
    for name, module in dense.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and name in layers:
            after = sum(int(p.count_nonzero()) for p in layers[name].parameters() if p.dim() > 1)
            saved = max(saved, weight.numel() / max(after, 1))
    return EXPLAINED * saved


def doubt(found: Ratio, believable: float) -> str | None:
    """Why a speed-up is not to be believed; None where it is."""
    if found.middle > believable:
        return f"{found} is more than the saved work explains (at most {believable:.0f}x)"
    if found.high > _WIDE * found.low:
        return f"{found} is too wide a range"
    return None


def near_the_fastest(quick: Mapping[str, timing.Timing]) -> set[str]:
    """The names of those of a quick reading that are worth another."""
    fastest = min(one.p50 for one in quick.values())
    return {name for name, one in quick.items() if one.p50 <= FAR * fastest}


def contest(
    contenders: Mapping[str, Callable[[], Any]],
    baselines: Mapping[str, Callable[[], Any]],
    seconds: float,
    doubts: Callable[[Mapping[str, timing.Timing]], list[str]],
    say: Callable[[str], None],
) -> tuple[dict[str, timing.Timing], dict[str, timing.Timing], list[str]]:
    """Times contenders in turn with the baselines that are among the fastest, as `timed`; the others once, before.

    A baseline whose one reading turns out to be faster than all that took part takes part as well, in another run.

    Args:
        contenders: name -> function without arguments.
        baselines: the same, of engines that may have threads of their own.
        seconds: time budget per callable, the first time.
        doubts: what looks wrong in a result, in words.
        say: told of every repetition.

    Returns:
        The timings of the contenders and of the baselines that took part; those of the baselines that did not; and the
        doubts that are left.
    """
    rest: dict[str, Any] = {"pause": PAUSE_S, "settle": SETTLE_S}
    quick = timing.interleaved(baselines, seconds=seconds / 4, min_rounds=2, **rest)
    near = near_the_fastest(quick)
    while True:
        taking_part = {name: call for name, call in baselines.items() if name in near}
        measured, left = timed({**taking_part, **contenders}, seconds, doubts, say, **rest)
        others = {name: one for name, one in quick.items() if name not in near}
        best = min(measured[name].p50 for name in near)
        faster = {name for name, one in others.items() if one.p50 < best}
        if not faster:
            return measured, others, left
        say(f"measured again with {', '.join(sorted(faster))}: faster before than what took part")
        near |= faster


def timed(
    callables: Mapping[str, Callable[[], Any]],
    seconds: float,
    doubts: Callable[[Mapping[str, timing.Timing]], list[str]],
    say: Callable[[str], None],
    **rest: Any,
) -> tuple[dict[str, timing.Timing], list[str]]:
    """`timing.interleaved`, again and for longer while there are doubts, and the doubts that are left.

    Args:
        callables: name -> function without arguments.
        seconds: time budget per callable, the first time.
        doubts: what looks wrong in a result, in words.
        say: told of every repetition.
        rest: ``pause`` and ``settle`` of `timing.interleaved`.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        measured = timing.interleaved(callables, seconds=attempt * seconds, **rest)
        found = doubts(measured)
        if not found or attempt == _ATTEMPTS:
            break
        say(f"measured again, for longer: {found[0]}")
    return measured, found
