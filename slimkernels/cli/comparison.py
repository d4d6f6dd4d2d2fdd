"""Speed-ups of whole networks that can be believed: with their spread, and measured again where they look wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from slimkernels import timing
from slimkernels.conversion.spread import EXPLAINED, Ratio, ratio_of_medians

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


def timed(
    callables: Mapping[str, Callable[[], Any]],
    seconds: float,
    doubts: Callable[[Mapping[str, timing.Timing]], list[str]],
    say: Callable[[str], None],
) -> tuple[dict[str, timing.Timing], list[str]]:
    """`timing.interleaved`, again and for longer while there are doubts, and the doubts that are left.

    Args:
        callables: name -> function without arguments.
        seconds: time budget per callable, the first time.
        doubts: what looks wrong in a result, in words.
        say: told of every repetition.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        measured = timing.interleaved(callables, seconds=attempt * seconds)
        found = doubts(measured)
        if not found or attempt == _ATTEMPTS:
            break
        say(f"measured again, for longer: {found[0]}")
    return measured, found
