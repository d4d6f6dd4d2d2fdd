"""What the steps of one native call touch, read off the numbers that native code gets, and which may run together."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

from slimkernels.kernels.cpu.conv2d import Step

Range = tuple[int, int, bool]  # first address, address behind the last, whether it is written
MARGIN = 16  # SLIM_OFFSETS_MARGIN


def ranges(step: Step) -> list[Range]:
    """Every range of bytes that csrc/kernels.h says the step reads or writes."""
    x, y, bias, weights, channels, tap_ptr, offsets, n, h, w, c_in, c_out, p, q, r, s = step.members[:16]
    strip, _, pool, lanes = step.members[22:]
    images = -(-n // lanes) * lanes
    if step.kind != 0:
        near, far = n * h * w * c_in, images * h * w * c_in
        read, written = (near, far) if step.kind == 1 else (far, near)
        return [(x, x + 4 * read, False), (y, y + 4 * written, True)]
    runs = -(-c_out // strip) * r * s
    entries = ctypes.c_int32.from_address(tap_ptr + 4 * runs).value
    read_counts = [
        (x, images * h * w * c_in), (bias, c_out), (weights, entries * strip), (channels, entries),
        (tap_ptr, runs + 1), (offsets, entries + MARGIN),
    ]  # fmt: skip
    found = [(at, at + 4 * count, False) for at, count in read_counts if at and count]
    return [*found, (y, y + 4 * images * (p >> pool) * (q >> pool) * c_out, True)]


def together(steps: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """Pairs of steps that no barrier and no thread keeps in order."""
    for i, step in enumerate(steps):
        for j in range(i + 1, len(steps)):
            if step.slot < 0 or steps[j].slot < 0:
                break
            if step.slot != steps[j].slot:
                yield i, j


def overlaps(a: Sequence[Range], b: Sequence[Range]) -> bool:
    """Whether one writes what the other touches."""
    return any(p < t and s < q and (v or w) for p, q, v in a for s, t, w in b)


def check(steps: Sequence[Step]) -> int:
    """Asserts that no two steps that may run together share bytes that one writes, and that none reads what it writes.

    Returns:
        The number of pairs that may run together.
    """
    touched = [ranges(step) for step in steps]
    for i, found in enumerate(touched):
        own = [r for r in found if r[2]], [r for r in found if not r[2]]
        assert not overlaps(*own), f"step {i} writes where it reads: {steps[i].members}"
    pairs = list(together(steps))
    for i, j in pairs:
        assert not overlaps(touched[i], touched[j]), (
            f"steps {i} (slot {steps[i].slot}) and {j} (slot {steps[j].slot}) may run at the same time, and "
            "one writes what the other touches"
        )
    return len(pairs)
