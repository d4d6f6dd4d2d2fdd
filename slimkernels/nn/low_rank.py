"""Low-rank twins of ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.formats import LOW_RANK_KINDS, LowRankWeight, factor_obstacle
from slimkernels.kernels.cpu.low_rank import PackedLowRank, prepare_conv2d, prepare_linear
from slimkernels.nn.attributes import check_epilogue, fx_call, int_pair
from slimkernels.nn.factors import Factors
from slimkernels.ops import low_rank_conv2d, low_rank_linear


class LowRankLinear(Factors):
    """Drop-in for ``nn.Linear``: ``y = epilogue((x V^T) U^T + bias)`` with U ``(out, rank)`` and V ``(rank, in)``."""

    bias: nn.Parameter | None
    _op = "low_rank_linear"
    # Below, torch's two products are done before two native calls have started (Zen 3, 1 to 256 rows: 65 000 weights
    # at 0.5 to 0.8 times torch's speed, 370 000 at 0.9 to 1.5 times).
    _least_weights = 2**18

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        epilogue: str = "none",
        kernel: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"LowRankLinear: expected rank in [1, {min(in_features, out_features)}], got {rank}")
        check_epilogue("LowRankLinear", "low_rank_linear", epilogue)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.epilogue, self.kernel = epilogue, kernel
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        # Kaiming's bound for the product: var(U V x) = rank * var(U) * in * var(V) * var(x).
        nn.init.normal_(self.U, std=rank**-0.5)
        nn.init.normal_(self.V, std=in_features**-0.5)
        self._init_factors(2)

    def _factors(self) -> list[Tensor]:
        parameters = self._parameters
        V, U = parameters.get("V"), parameters.get("U")
        # Not there where they are parametrized: they are computed then.
        return [self.V if V is None else V, self.U if U is None else U]

    def _prepare(self, isa: str, packed: Sequence[Tensor]) -> PackedLowRank:
        return prepare_linear(isa, packed, self.U, self.V, self.epilogue)

    @classmethod
    def from_factors(
        cls, U: Tensor, V: Tensor, bias: Tensor | None = None, epilogue: str = "none", kernel: str = "auto"
    ) -> LowRankLinear:
        """The layer with the given factors (copied). Raises ValueError where they do not chain."""
        LowRankWeight("svd", (V, U)).validate()
        module = cls(
            V.shape[1],
            U.shape[0],
            U.shape[1],
            bias is not None,
            epilogue=epilogue,
            kernel=kernel,
            device=U.device,
            dtype=U.dtype,
        )
        with torch.no_grad():
            module.U.copy_(U)
            module.V.copy_(V)
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    @classmethod
    def from_dense(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """Best rank-``rank`` approximation (truncated SVD in float64, singular values split evenly, Eckart-Young)."""
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(f"LowRankLinear.from_dense: expected rank in [1, {min(linear.weight.shape)}], got {rank}")
        u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        root = s[:rank].sqrt()
        factors = (u[:, :rank] * root).to(linear.weight), (root[:, None] * vh[:rank]).to(linear.weight)
        return cls.from_factors(*factors, linear.bias).train(linear.training)

    def to_dense(self) -> nn.Linear:
        """The merged dense layer; a fused epilogue is not part of it."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.U.device, self.U.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.U @ self.V)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt_rows(x, self._parameters.get("bias"))
            if y is not None:
                return y
        if (node := fx_call(self, x)) is not None:
            return node
        return low_rank_linear(x, self.U, self.V, self.bias, self._packed(), epilogue=self.epilogue, kernel=self.kernel)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


class LowRankConv2d(Factors):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding): a chain of factor convolutions, bias after the last.

    Args:
        in_channels: of the merged convolution, as ``nn.Conv2d``.
        out_channels: of the merged convolution.
        kernel_size: of the merged convolution.
        stride: of the merged convolution.
        padding: of the merged convolution.
        dilation: of the merged convolution.
        bias: whether there is one, added after the last factor.
        kind: ``svd`` (RxS then 1x1), ``tai`` (Rx1 then 1xS) or ``tucker2`` (1x1, RxS, 1x1).
        ranks: ``(rank,)``, for ``tucker2`` ``(rank_in, rank_out)``.
        epilogue: ``none`` or ``relu``.
        kernel: a kernel's name, or ``auto``.

    ``factors`` is the ``nn.ParameterList`` of the ordered convolution weights, channels_last like the activations.
    """

    bias: nn.Parameter | None
    _op = "low_rank_conv2d"
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        kind: str,
        ranks: Sequence[int],
        epilogue: str = "none",
        kernel: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in LOW_RANK_KINDS:
            raise ValueError(f"LowRankConv2d: expected kind in {LOW_RANK_KINDS}, got {kind!r}")
        if len(ranks) != (2 if kind == "tucker2" else 1) or min(ranks) < 1:
            raise ValueError(
                f"LowRankConv2d: expected {'(rank_in, rank_out)' if kind == 'tucker2' else '(rank,)'}, "
                f"got {tuple(ranks)}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        own = type(self).__name__
        self.kernel_size, self.stride = int_pair(own, "kernel_size", kernel_size), int_pair(own, "stride", stride)
        self.padding, self.dilation = int_pair(own, "padding", padding), int_pair(own, "dilation", dilation)
        self.kind, self.ranks, self.epilogue, self.kernel = kind, tuple(int(r) for r in ranks), epilogue, kernel
        super()._check_attributes()
        r, s = self.kernel_size
        shapes = {
            "svd": [(ranks[0], in_channels, r, s), (out_channels, ranks[0], 1, 1)],
            "tai": [(ranks[0], in_channels, r, 1), (out_channels, ranks[0], 1, s)],
            "tucker2": [(ranks[0], in_channels, 1, 1), (ranks[-1], ranks[0], r, s), (out_channels, ranks[-1], 1, 1)],
        }[kind]
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype, memory_format=torch.channels_last))
            for shape in shapes
        )
        for factor in self.factors:
            nn.init.normal_(factor, std=factor[0].numel() ** -0.5)
        zeros = torch.zeros(out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._init_factors(len(shapes))

    def _factors(self) -> list[Tensor]:
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        return list(self._modules["factors"]._parameters.values())  # type: ignore[union-attr,arg-type]

    def _check_attributes(self) -> None:
        super()._check_attributes()
        obstacle = factor_obstacle(self.kind, tuple(tuple(f.shape) for f in self._factors()))
        if obstacle is not None:
            raise ValueError(f"LowRankConv2d: {obstacle}")

    def _prepare(self, isa: str, packed: Sequence[Tensor]) -> PackedLowRank:
        geometry = self.stride, self.padding, self.dilation
        # For mypy: tuples have the right length, which their types do not say.
        return prepare_conv2d(isa, packed, self._factors(), *geometry, self.kind, self.epilogue)  # type: ignore[arg-type]

    @classmethod
    def from_factors(
        cls,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        kind: str,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        epilogue: str = "none",
        kernel: str = "auto",
    ) -> LowRankConv2d:
        """The layer with the given factors (copied). Raises ValueError where they do not chain or fit ``kind``."""
        LowRankWeight(kind, tuple(factors)).validate()
        kernel_size = max(f.shape[2] for f in factors), max(f.shape[3] for f in factors)
        module = cls(
            factors[0].shape[1],
            factors[-1].shape[0],
            kernel_size,
            stride,
            padding,
            dilation,
            bias is not None,
            kind=kind,
            ranks=[f.shape[0] for f in factors[:-1]],
            epilogue=epilogue,
            kernel=kernel,
            device=factors[0].device,
            dtype=factors[0].dtype,
        )
        with torch.no_grad():
            for parameter, factor in zip(module.factors, factors):
                parameter.copy_(factor)
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    def weight_low_rank(self) -> LowRankWeight:
        """The factors as a `LowRankWeight` that shares this module's parameters."""
        return LowRankWeight(self.kind, tuple(self.factors))

    def to_dense(self) -> nn.Conv2d:
        """The merged dense convolution; a fused epilogue is not part of it."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.factors[0].device,
            dtype=self.factors[0].dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight_low_rank().to_dense())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt(x, self._parameters.get("bias"))
            if y is not None:
                return y
        if (node := fx_call(self, x)) is not None:
            return node
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return low_rank_conv2d(
            x,
            self._factors(),
            self.bias,
            self._packed(),
            kind=self.kind,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            epilogue=self.epilogue,
            kernel=self.kernel,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, kind={self.kind!r}, ranks={self.ranks}, "
            f"bias={self.bias is not None}, epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )
