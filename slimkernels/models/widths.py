"""One meaning of ``width`` for every network here: channels of the first stage, or a factor on all stages."""

from __future__ import annotations

from collections.abc import Sequence

MIN_CHANNELS = 4


def scaled(name: str, channels: Sequence[int], width: int | float) -> list[int]:
    """The channel counts of a network made narrower or wider.

    Args:
        name: of the network, which begins every message.
        channels: at full width, the first stage first.
        width: int, the channels of the first stage, the others in proportion; or float, a factor on all of them.
            Counts that are multiples of 8 at full width stay so (rounded, at least 8), because the kernels take
            eight channels at a time; others are rounded to at least 1.

    Raises:
        TypeError: width is no number. ValueError: a factor that is not positive and finite, or fewer than 4 channels
            (an int 1 or 2 is a factor that lacks its point).
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise TypeError(f"{name}: expected width to be an int (channels) or a float (factor), got {width!r}")
    if isinstance(width, int):
        if width < MIN_CHANNELS:
            raise ValueError(
                f"{name}: expected width >= {MIN_CHANNELS} channels, or a factor written as a float, got {width}"
            )
        return [width, *(max(1, round(c * width / channels[0])) for c in channels[1:])]
    if not 0.0 < width < float("inf"):
        raise ValueError(f"{name}: expected a width factor > 0 and finite, got {width}")
    return [8 * max(1, round(c * width / 8)) if c % 8 == 0 else max(1, round(c * width)) for c in channels]
