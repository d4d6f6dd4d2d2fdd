"""The prepacked factors that a low-rank module keeps in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.dispatch.select import resolve
from slimkernels.kernels.cpu.low_rank import TENSORS_PER_FACTOR, PackedLowRank, pack_factors
from slimkernels.kernels.problems import Request
from slimkernels.nn.attributes import AttributesInUse
from slimkernels.ops.library import nothing_watches
from slimkernels.tensors import Snapshot, is_plain


class PrepackedFactors(AttributesInUse):
    """What the low-rank modules share: the packed copy of their factors that the CPU kernels read.

    As in the block-sparse modules, the pack exists in eval mode only. It is dropped by ``train()``, when the module is
    moved or loaded, and it is passed over (torch's layers then run) when a factor changed since or wants a gradient.
    Writing to the factors in eval mode is legal; call ``prepack()`` afterwards to be fast again, and always after an
    in-place write through ``.data``, which torch does not count. Assigning to ``stride``, ``padding``, ``dilation``,
    ``kind``, ``epilogue`` or ``kernel`` builds the pack anew. A compiled module reads the pack of frozen factors
    only, and sees writes to those after ``prepack()``; an exported program never sees them.
    """

    epilogue: str
    kernel: str
    bias: torch.nn.Parameter | None
    _least_weights = 0
    _packed_from: tuple[Snapshot, ...] | None

    def _factors(self) -> list[Tensor]:
        """The factors in the order in which they run."""
        raise NotImplementedError

    def _prepare(self, isa: str, packed: Sequence[Tensor]) -> PackedLowRank:
        """The ready call of a pack."""
        raise NotImplementedError

    def _init_packed(self, factors: int) -> None:
        self._packed_names = tuple(f"packed_{i}" for i in range(TENSORS_PER_FACTOR * factors))
        for name in self._packed_names:
            self.register_buffer(name, None, persistent=False)
        self._packed_from = None
        self._prepared: PackedLowRank | None = None
        # A convolution's factors lie in a ParameterList, which is loaded after the module itself.
        self.register_load_state_dict_post_hook(_repack_after_load)

    def prepack(self) -> None:
        """Packs the present factors where a kernel of this machine uses a pack. Eval mode only."""
        self.drop_packed()
        factors = self._factors()
        if self.training or any(not f.is_cpu or not is_plain(f) or type(f.data) is not Tensor for f in factors):
            return
        isa = self._isa()
        if isa is None:
            return
        # Torch counts no writes to tensors made in inference mode, and a pack with uncounted writes is checked anew.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in zip(self._packed_names, pack_factors(factors, isa), strict=True):
                setattr(self, name, tensor)
        self._set_packed_from(isa)

    @property
    def prepacked(self) -> bool:
        """Whether there is a pack of the present factors."""
        return self._pack_is_current()

    def drop_packed(self) -> None:
        """Forgets the prepacked factors."""
        for name in self._packed_names:
            setattr(self, name, None)
        self._packed_from = None
        self._prepared = None

    def _isa(self) -> str | None:
        """Instruction set of the CPU kernel that the module's calls take; None where they take none."""
        factors = self._factors()
        first = factors[0]
        if self.kernel == "auto" and env.backend() == "auto" and sum(f.numel() for f in factors) < self._least_weights:
            return None
        try:
            return resolve(self.kernel, Request(self._op, first.dtype, first.device.type, (1, 1), self.epilogue)).isa
        except ValueError:  # the forward says why
            return None

    def _set_packed_from(self, isa: str) -> None:
        packed: list[Any] = [self._buffers[name] for name in self._packed_names]
        self._prepared = self._prepare(isa, packed)
        self._packed_from = tuple(Snapshot(factor) for factor in self._factors())

    def _pack_is_current(self) -> bool:
        if self._packed_from is None:
            return False
        return all(source.holds(factor) for source, factor in zip(self._packed_from, self._factors()))

    def _ready(self, x: Tensor) -> PackedLowRank | None:
        """The prepared call, where nothing watches the op and the factors are those that were packed."""
        if self._prepared is None:
            return None
        if not nothing_watches(x, *self._factors(), self._parameters.get("bias")) or not self._pack_is_current():
            return None
        return self._prepared

    def _attributes_changed(self) -> None:
        self.drop_packed()
        if not self.training:
            self.prepack()

    def _packed(self) -> list[Tensor]:
        packed = [self._buffers[name] for name in self._packed_names]
        if packed[0] is None:
            return []
        wants_grad = any(f.requires_grad for f in self._factors())
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # A recorded program cannot see later writes, so only frozen factors may be read through the pack.
            usable = not wants_grad
        else:
            usable = self._pack_is_current() and not (wants_grad and torch.is_grad_enabled())
        return packed if usable else []  # type: ignore[return-value]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.drop_packed()
        elif not self._pack_is_current():
            self.prepack()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._factors()[0].device.type, self._factors()[0].dtype
        self.drop_packed()
        super()._apply(fn, recurse)
        if (self._factors()[0].device.type, self._factors()[0].dtype) != before:
            self.kernel = "auto"  # which packs in eval mode
        elif not self.training:
            self.prepack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._pack_is_current():
            state["_buffers"] = {k: None if k in self._packed_names else v for k, v in self._buffers.items()}
        state["_packed_from"] = state["_prepared"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._buffers[self._packed_names[0]] is None:
            return
        isa = self._isa()
        if isa is None:
            self.drop_packed()
        else:
            self._set_packed_from(isa)


def _repack_after_load(module: PrepackedFactors, _incompatible: Any) -> None:
    module.drop_packed()
    if not module.training:
        module.prepack()
