"""What the steps of one native call touch, read off the numbers that native code gets, and which may run together."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.cpu.steps import (
    AVERAGE_POOL,
    CONV2D,
    MAX_POOL,
    PADDED_AVERAGE_POOL,
    PAIRS_CONV2D,
    TO_PAIRS,
    Step,
)

POOLINGS = (MAX_POOL, AVERAGE_POOL, PADDED_AVERAGE_POOL)

Range = tuple[int, int, bool]  # first address, address behind the last, whether it is written


def ranges(step: Step) -> list[Range]:
    """Every range of bytes that csrc/kernels.h says the step reads or writes."""
    a = step.arguments
    images = -(-a.n // a.lanes) * a.lanes
    if step.kind >= TO_PAIRS:
        return _ranges_in_pairs(step, images)
    if step.kind in POOLINGS:
        read, written = images * a.h * a.w * a.c_in, images * a.p * a.q * a.c_in
        return [(a.x, a.x + 4 * read, False), (a.y, a.y + 4 * written, True)]
    if step.kind != CONV2D:
        near, far = a.n * a.h * a.w * a.c_in, images * a.h * a.w * a.c_in
        read, written = (near, far) if step.kind == 1 else (far, near)
        return [(a.x, a.x + 4 * read, False), (a.y, a.y + 4 * written, True)]
    runs = -(-a.c_out // a.strip) * a.r * a.s
    entries = ctypes.c_int32.from_address(a.tap_ptr + 4 * runs).value
    module = library()[0]
    assert module is not None
    read_counts = [
        (a.x, images * a.h * a.w * a.c_in), (a.bias, a.c_out), (a.weights, entries * a.strip), (a.channels, entries),
        (a.tap_ptr, runs + 1), (a.offsets, module.entry_offsets_count(a)),
        (a.residual, images * a.p * a.q * a.c_out),
    ]  # fmt: skip
    found = [(at, at + 4 * count, False) for at, count in read_counts if at and count]
    return [*found, (a.y, a.y + 4 * images * (a.p >> a.pool) * (a.q >> a.pool) * a.c_out, True)]


def _ranges_in_pairs(step: Step, images: int) -> list[Range]:
    a = step.arguments

    def nbytes(h: int, w: int, channels: int, floats: int = 0) -> int:
        return images * h * w * (4 * channels if floats else 4 * (-(-channels // 2)))

    if step.kind == TO_PAIRS:
        read, written = 4 * a.n * a.h * a.w * a.c_in, nbytes(a.h, a.w, a.c_in)
        return [(a.x, a.x + read, False), (a.y, a.y + written, True)]
    c_out = a.c_out if step.kind == PAIRS_CONV2D else a.c_in
    read, written = nbytes(a.h, a.w, a.c_in), nbytes(a.p >> a.pool, a.q >> a.pool, c_out, a.to_floats)
    found = [(a.x, a.x + read, False), (a.y, a.y + written, True)]
    if step.kind == PAIRS_CONV2D:
        strips = -(-a.c_out // 16)
        groups = ctypes.c_int32.from_address(a.tap_ptr + 4 * strips).value
        others = [
            (a.bias, 4 * a.c_out), (a.weights, 1024 * groups), (a.channels, 272 * groups), (a.tap_ptr, 4 * strips + 4),
            (a.residual, nbytes(a.p, a.q, a.c_out)),
        ]  # fmt: skip
        found += [(at, at + count, False) for at, count in others if at and count]
    return found


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
        assert not overlaps(*own), f"step {i} writes where it reads: {steps[i].arguments}"
    pairs = list(together(steps))
    for i, j in pairs:
        assert not overlaps(touched[i], touched[j]), (
            f"steps {i} (slot {steps[i].slot}) and {j} (slot {steps[j].slot}) may run at the same time, and "
            "one writes what the other touches"
        )
    return len(pairs)
