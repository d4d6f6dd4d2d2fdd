"""Packs: what a kernel reads beside, or instead of, a weight as it is stored, as one named record for each kind.

The schemas of the ops take a pack as a plain list of tensors, which torch can trace, export and cast. Which list is
which is decided here and nowhere else, by `kind_of`: no two kinds of an op have equally many tensors.

| kind | made by | read by | checked by |
| --- | --- | --- | --- |
| `StripPack` | `strips.pack_strips`, `cpu.low_rank.pack_factor` | CPU kernels | `strips.check_pack` |
| `ForwardOrder` | `triton.bsr_conv2d_index.forward_order` | Triton kernels | `triton.bsr_conv2d_index.check_order` |
| `TensorCorePack` | `resident_plan.pack` | tensor-core kernels of CUDA C++ | their launcher, `cuda_tensor_cores` |
| `StemPack` | `cuda_tensor_cores.pack_stem` | fused stem of CUDA C++ | its launcher, `cuda_tensor_cores` |

A kernel that is handed another kernel's pack passes it over, but for the CPU kernels, which refuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class StripPack(NamedTuple):
    """A weight for the CPU kernels, in strips of output channels, see csrc/kernels.h.

    Attributes:
        weights: float32 ``(entries, strip)``.
        channels: int32 ``(entries,)``, the input channel of each entry.
        tap_ptr: int32 ``(strips * taps + 1,)``, where each tap of each strip begins.
    """

    weights: Tensor
    channels: Tensor
    tap_ptr: Tensor


class ForwardOrder(NamedTuple):
    """The order in which the Triton kernels take block rows and blocks.

    Attributes:
        order: int32, one dimension.
    """

    order: Tensor


class TensorCorePack(NamedTuple):
    """A weight for the tensor-core kernels of CUDA C++.

    Attributes:
        weights: ``(steps + 1, column * 16)``, of float32 ``(steps + 1, column * 8)`` and rounded to TF32, in the order
            in which lanes hold them, the last step zero.
        group_start: as `resident_plan.Index` has it.
        taps: as `resident_plan.Index` has them.
        most_steps: as `resident_plan.Index` has them.
    """

    weights: Tensor
    group_start: Tensor
    taps: Tensor
    most_steps: Tensor


class StemPack(NamedTuple):
    """The two weights of the fused stem.

    Attributes:
        first: ``(2, 1024)``, the dense first convolution.
        weights: that of the second one's `TensorCorePack`.
        group_start: likewise.
        taps: likewise.
        most_steps: likewise.
    """

    first: Tensor
    weights: Tensor
    group_start: Tensor
    taps: Tensor
    most_steps: Tensor

    @property
    def second(self) -> TensorCorePack:
        """The pack of the second convolution."""
        return TensorCorePack(*self[1:])


Pack = StripPack | ForwardOrder | TensorCorePack | StemPack
KINDS: tuple[type[Pack], ...] = (StripPack, ForwardOrder, TensorCorePack, StemPack)
_KIND_OF_COUNT = {len(kind._fields): kind for kind in KINDS}


def kind_of(packed: Sequence[Tensor]) -> type[Pack] | None:
    """The record that a list of tensors, as an op was given it, is made into; None for no pack, an empty list say.

    The tensors themselves are not looked at: the kernel that reads the pack, or the op for it, checks them.
    """
    return _KIND_OF_COUNT.get(len(packed))


def factor_packs(op: str, packed: Sequence[Tensor], factors: int) -> list[StripPack]:
    """The packs of a low-rank layer's factors, which its ops are given one after the other.

    Raises:
        ValueError: not as many tensors as so many factors have.
    """
    size = len(StripPack._fields)
    if len(packed) != size * factors:
        raise ValueError(f"{op}: expected {size * factors} packed tensors, got {len(packed)}")
    return [StripPack(*packed[size * i : size * (i + 1)]) for i in range(factors)]
