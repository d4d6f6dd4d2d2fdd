"""torch's switches of float32 arithmetic on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def set_tf32(convolutions: bool, products: bool) -> None:
    """Whether float32 convolutions and matrix products may multiply in TF32.

    torch has two interfaces to one state. A ``fp32_precision`` of one operation that differs from the others' leaves a
    state in which torch's own ``cudnn.flags`` and ``torch.export`` raise; ``allow_tf32`` sets all parts of it.
    """
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


@contextlib.contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Float32 convolutions and matrix products in ``ieee`` or ``tf32``, for a while."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    # Reading is safe: ``fp32_precision`` never raises, ``allow_tf32`` does in a mixed state.
    before = [switch.fp32_precision == "tf32" for switch in switches]
    set_tf32(value == "tf32", value == "tf32")
    try:
        yield
    finally:
        set_tf32(*before)
