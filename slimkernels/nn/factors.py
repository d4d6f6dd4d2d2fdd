"""What the low-rank modules share: their dense factors, and the pack of them that the CPU kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from slimkernels import env
from slimkernels.dispatch.select import resolve
from slimkernels.kernels.cpu.low_rank import PackedLowRank, pack_factors
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import Request
from slimkernels.nn.packing import Prepacked


class Factors(Prepacked):
    """A pack that is passed over leaves the layer to torch's own layers, factor by factor."""

    epilogue: str
    _least_weights = 0

    def _factors(self) -> list[Tensor]:
        """The factors in the order in which they run."""
        raise NotImplementedError

    def _prepare(self, isa: str, packed: Sequence[Tensor]) -> PackedLowRank:
        """The ready call of a pack."""
        raise NotImplementedError

    def _init_factors(self, count: int) -> None:
        self._pack_buffers = (tuple(f"packed_{i}" for i in range(len(StripPack._fields) * count)),)
        self._init_packing()
        # A convolution's factors lie in a ParameterList, which is loaded after the module itself.
        self.register_load_state_dict_post_hook(_repack_after_load)

    def _weights(self) -> list[Tensor]:
        return self._factors()

    def _make_pack(self) -> Mapping[str, Tensor] | None:
        factors = self._factors()
        isa = self._isa() if all(factor.is_cpu for factor in factors) else None
        return None if isa is None else dict(zip(self._pack_buffers[0], pack_factors(factors, isa), strict=True))

    def _make_call(self) -> PackedLowRank | None:
        isa = self._isa()
        packed: list[Any] = [self._buffers[name] for name in self._pack_buffers[0]]
        return None if isa is None else self._prepare(isa, packed)

    def _isa(self) -> str | None:
        factors = self._factors()
        first = factors[0]
        if self.kernel == "auto" and env.backend() == "auto" and sum(f.numel() for f in factors) < self._least_weights:
            return None
        try:
            return resolve(self.kernel, Request(self._op, first.dtype, first.device.type, (1, 1), self.epilogue)).isa
        except ValueError:  # the forward says why
            return None


def _repack_after_load(module: Factors, _incompatible: Any) -> None:
    module.drop_packed()
    if not module.training:
        module.prepack()
