"""Native convolutions and copies between layouts as a list of steps that one team of threads runs again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import Conv2dArguments, address
from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.problems import LANES, Pair
from slimkernels.tensors import is_plain

CONV2D, TO_IMAGES, FROM_IMAGES, MAX_POOL, AVERAGE_POOL, PADDED_AVERAGE_POOL = range(6)  # SLIM_STEP_*
# The same for activations in pairs, bf16 (`pairs`); the poolings follow in the order of those above.
TO_PAIRS, PAIRS_CONV2D, PAIRS_MAX_POOL, LAST_KIND = 6, 7, 8, 10


def images_innermost(
    n: int, h: int, w: int, channels: int, isa: str, parts: Pair = WHOLE
) -> tuple[int, int, int, int, int]:
    """Shape of n images in the layout that keeps a vector of images, or of their parts, innermost."""
    lanes, (rows, columns) = LANES[isa], parts
    return -(-n * rows * columns // lanes), h // rows, w // columns, channels, lanes


class Step(NamedTuple):
    """One step of csrc/kernels.h and the tensors it reads and writes.

    Steps that follow each other with slots from 0 on run at the same time where the slots differ, each on one thread;
    steps with slot -1 share all threads.
    """

    kind: int
    arguments: Conv2dArguments
    alive: tuple[Any, ...]
    slot: int = -1

    def reads(self) -> list[Tensor]:
        """Every tensor that the step reads."""
        if self.kind not in (CONV2D, PAIRS_CONV2D):
            return [self.alive[0]]
        conv, x, _, *others = self.alive
        return [t for t in (x, *conv.packed, *others) if t is not None]

    def writes(self) -> list[Tensor]:
        """Every tensor that the step writes."""
        return [self.alive[2 if self.kind in (CONV2D, PAIRS_CONV2D) else 1]]


class Steps:
    """A list of steps on fixed memory, run by one team of threads; keeps every tensor it touches alive.

    Raises:
        RuntimeError: in a call, when a native kernel failed (out of memory).
    """

    def __init__(self, isa: str, steps: Sequence[Step]) -> None:
        module = library()[0]
        assert module is not None
        self._isa, self._alive, self.count = isa, [step.alive for step in steps], len(steps)
        self._steps = module.Steps(isa, [(step.kind, step.slot, *step.arguments) for step in steps])

    def __call__(self) -> None:
        status = self._steps.run(torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"Steps: native kernels of {self._isa} failed with status {status}")


class MovableSteps:
    """The same list of steps on other memory in every call: inputs, an output and a workspace that the caller brings.

    Any number of threads may call it, each with memory of its own.

    Args:
        isa: instruction set of the kernels.
        steps: made on the memory below, and on tensors (weights, biases) that stay where they are.
        memory: tensors on the CPU of which no two overlap, images channels_last and all others contiguous. They are not
            kept alive: a call brings others of the same shapes, dtypes and layouts.

    Raises:
        ValueError: in a call, for tensors unlike those. RuntimeError: when a native kernel failed (out of memory).
    """

    def __init__(self, isa: str, steps: Sequence[Step], memory: Sequence[Tensor]) -> None:
        module = library()[0]
        assert module is not None
        ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in memory]
        self._like = [(t.shape, t.dtype) for t in memory]
        self._isa = isa
        self._steps = module.Steps(isa, [(step.kind, step.slot, *step.arguments) for step in steps], ranges)
        self._alive = [
            t
            for step in steps
            for t in (*step.reads(), *step.writes())
            if not any(begin <= t.data_ptr() < begin + nbytes for begin, nbytes in ranges)
        ]

    def __call__(self, *memory: Tensor) -> None:
        given = [(t.shape, t.dtype) for t in memory]
        if given != self._like or not all(t.is_cpu and is_plain(t) and _lies_in_order(t) for t in memory):
            raise ValueError(f"MovableSteps: expected dense CPU tensors like {self._like}, got {given}")
        self.run_at([t.data_ptr() for t in memory])

    def run_at(self, addresses: Sequence[int]) -> None:
        """The same at addresses that nothing checks, which takes 10 us less: for who has made these tensors itself.

        Raises:
            RuntimeError: a native kernel failed (out of memory).
        """
        status = self._steps.run_at(addresses, torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"MovableSteps: native kernels of {self._isa} failed with status {status}")


def layout_step(x: Tensor, y: Tensor, n: int, parts: Pair = WHOLE) -> Step:
    """The copy of n images between channels_last (or rows) and a vector of images innermost as one of `Steps`.

    Args:
        x: what is copied, float32 on the CPU: images channels_last, rows, or ``(groups, h, w, channels, lanes)``.
        y: where it is copied to, in the other layout, in memory that does not overlap x.
        n: images, or rows.
        parts: rows and columns of parts that each image is cut into.

    Raises:
        ValueError: tensors of another shape, dtype or layout.
    """
    to_images = y.dim() == 5
    near, far = (x, y) if to_images else (y, x)
    _, channels, h, w = image_sizes(near)
    lanes, (rows, columns) = far.shape[-1], parts
    fits = (
        near.dim() < 5 and near.shape[0] == n and h % rows == 0 and w % columns == 0 and lanes % (rows * columns) == 0
    )
    n_parts, h, w = n * rows * columns, h // rows, w // columns
    fits = fits and far.shape == (-(-n_parts // lanes), h, w, channels, lanes)
    if not (fits and n > 0 and is_dense(x) and is_dense(y)):
        raise ValueError(f"layout_step: expected {n} images in two layouts, got {tuple(x.shape)} and {tuple(y.shape)}")
    arguments = Conv2dArguments(
        x=address(x), y=address(y), n=n_parts, h=h, w=w, c_in=channels, lanes=lanes, parts_h=rows, parts_w=columns
    )
    return Step(TO_IMAGES if to_images else FROM_IMAGES, arguments, (x, y))


def image_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """``(n, channels, h, w)``; rows are images of one pixel, and n counts groups where images lie innermost."""
    if x.dim() == 5:
        return x.shape[0], x.shape[3], x.shape[1], x.shape[2]
    if x.dim() == 4:
        return x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    return x.numel() // max(x.shape[-1], 1), x.shape[-1], 1, 1


def is_dense(x: Tensor) -> bool:
    """Plain float32 on the CPU, images channels_last, everything else contiguous."""
    if x.dtype is not torch.float32 or not x.is_cpu or not is_plain(x):
        return False
    return _lies_in_order(x)


def _lies_in_order(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
