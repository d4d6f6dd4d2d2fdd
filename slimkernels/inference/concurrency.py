"""Which native steps may run at the same time, and whether they get into each other's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from slimkernels.kernels.cpu.steps import Step


def conflict(steps: Sequence[Step]) -> tuple[int, int] | None:
    """Two steps of one native call that may run at the same time while one writes bytes that the other touches.

    Steps with slots from 0 on that follow each other are not kept in order across slots (csrc/kernels.h). Inside a slot
    they are, and a step with slot -1 begins when all before it is done, as do those behind it.

    Returns:
        The steps' positions, or None where everything may run.
    """
    start = 0
    for i in range(len(steps) + 1):
        if i < len(steps) and steps[i].slot >= 0:
            continue
        found = _conflict_of_slots(steps, range(start, i))
        if found is not None:
            return found
        start = i + 1
    return None


def byte_ranges(step: Step) -> Iterator[tuple[int, int, bool]]:
    """``(first address, address behind the last, whether it is written)`` of everything that a step touches."""
    for tensors, written in ((step.reads(), False), (step.writes(), True)):
        for tensor in tensors:
            begin, nbytes = tensor.data_ptr(), _extent(tensor)
            if nbytes:
                yield begin, begin + nbytes, written


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _conflict_of_slots(steps: Sequence[Step], run: range) -> tuple[int, int] | None:
    """The same for steps that all have slots."""
    if len({steps[i].slot for i in run}) < 2:
        return None
    ranges = sorted((begin, end, i, written) for i in run for begin, end, written in byte_ranges(steps[i]))
    # Addresses are passed in ascending order. For each slot: the end of what it touches (of what it writes) so far, and
    # the step whose memory that is.
    touched: dict[int, tuple[int, int]] = {}
    changed: dict[int, tuple[int, int]] = {}
    for begin, end, i, written in ranges:
        slot = steps[i].slot
        for other, (reach, at) in (touched if written else changed).items():
            if other != slot and reach > begin:
                return min(i, at), max(i, at)
        touched[slot] = max(touched.get(slot, (0, i)), (end, i))
        if written:
            changed[slot] = max(changed.get(slot, (0, i)), (end, i))
    return None
