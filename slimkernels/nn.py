"""Drop-in modules: block-sparse and low-rank twins of ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from slimkernels.formats import LOW_RANK_KINDS, BSRWeight, LowRankWeight, block_shape_2d
from slimkernels.kernels import EPILOGUES, native
from slimkernels.kernels.problems import Request
from slimkernels.kernels.select import resolve
from slimkernels.ops.library import OPS

__all__ = ["BlockSparseConv2d", "BlockSparseLinear", "LowRankConv2d", "LowRankLinear"]


def unsupported_conv_reason(conv: nn.Conv2d) -> str | None:
    """Why a ``nn.Conv2d`` has no block-sparse or low-rank twin, naming attribute and value; None when it has one."""
    if conv.groups != 1:
        return f"groups={conv.groups} is not supported, expected 1"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported, expected 'zeros'"
    if not conv.weight.is_floating_point():
        return f"weight dtype {conv.weight.dtype} is not supported, expected floating point"
    try:
        resolved_padding(conv)
    except ValueError as error:
        return str(error)
    return None


def resolved_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """A convolution's padding as two ints; ``'same'`` where it is symmetric. Raises ValueError where it is not."""
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if any(t % 2 for t in total):
        raise ValueError(f"padding='same' with kernel_size={conv.kernel_size} is asymmetric and not supported")
    return total[0] // 2, total[1] // 2


def _check_epilogue(name: str, op: str, epilogue: str) -> None:
    if epilogue not in EPILOGUES[op]:
        raise ValueError(f"{name}: expected epilogue in {sorted(EPILOGUES[op])}, got {epilogue!r}")


class _BlockSparse(nn.Module):
    """What the block-sparse modules share: the weight's tensors and the prepacked copy that the CPU kernels read.

    The pack exists in eval mode only. It is dropped by ``train()``, when the module is moved or loaded, and it is passed over (the
    op then packs by itself) when ``values`` changed since or wants a gradient. Writing to ``values`` in eval mode is legal; call
    ``prepack()`` afterwards to be fast again, and always after an in-place write through ``values.data``, which torch does not count.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    weight_shape: tuple[int, ...]
    block_shape: tuple[int, int]
    epilogue: str
    kernel: str
    _op: str
    _packed_names = ("packed_weights", "packed_channels", "packed_tap_ptr")

    def _init_weight(
        self, weight_shape: Sequence[int], block_shape: Sequence[int], crow_indices: Tensor, col_indices: Tensor, bias: bool,
        epilogue: str, kernel: str, device: Any, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.weight_shape = tuple(int(d) for d in weight_shape)
        self.block_shape = block_shape_2d(block_shape)
        _check_epilogue(type(self).__name__, self._op, epilogue)
        self.epilogue, self.kernel = epilogue, kernel
        self.register_buffer("crow_indices", crow_indices.to(device=device, dtype=torch.int32))
        self.register_buffer("col_indices", col_indices.to(device=device, dtype=torch.int32))
        self.values = nn.Parameter(torch.zeros(col_indices.numel(), *self.block_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.weight_shape[0], device=device, dtype=dtype)) if bias else None
        for name in self._packed_names:
            self.register_buffer(name, None, persistent=False)
        self._packed_from: tuple[Tensor, int] | None = None
        self.weight_bsr().validate()

    def _assign(self, weight: BSRWeight, like: nn.Conv2d | nn.Linear) -> None:
        """Takes over the values and bias of a dense layer, its training flag and requires_grad."""
        bias = like.bias
        with torch.no_grad():
            self.values.copy_(weight.values)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)
        self.values.requires_grad_(like.weight.requires_grad)
        if self.bias is not None and bias is not None:
            self.bias.requires_grad_(bias.requires_grad)
        self.train(like.training)

    def weight_bsr(self) -> BSRWeight:
        """The weight as a `BSRWeight` that shares this module's tensors."""
        c_out, c_in, r, s = (*self.weight_shape, 1, 1)[:4]
        return BSRWeight(self.values, self.crow_indices, self.col_indices, (c_out, c_in, r, s), self.block_shape)

    def prepack(self) -> None:
        """Builds the prepacked weight for the present values where a kernel of this machine uses one. Eval mode only."""
        self.drop_packed()
        values = self.values
        if self.training or values.device.type != "cpu" or values.is_meta or type(values.data) is not torch.Tensor:
            return
        try:
            spec = resolve(
                self.kernel, Request(self._op, values.dtype, values.device.type, self.block_shape, self.epilogue)
            )
        except ValueError:
            return
        if spec.isa is None:
            return
        weight = self.weight_bsr()
        with torch.no_grad():
            packed = native.pack_strips(
                values, self.crow_indices, self.col_indices, weight.weight_shape, self.block_shape,
                native.strip_width(self.block_shape[0], spec.isa),
            )  # fmt: skip
        for name, tensor in zip(self._packed_names, packed):
            setattr(self, name, tensor)
        self._packed_from = values.detach(), _version(values)

    def drop_packed(self) -> None:
        """Forgets the prepacked weight."""
        for name in self._packed_names:
            setattr(self, name, None)
        self._packed_from = None

    def _pack_is_current(self) -> bool:
        if self._packed_from is None:
            return False
        source, version = self._packed_from
        return _version(self.values) == version and self.values.is_set_to(source)

    def _packed(self) -> list[Tensor]:
        buffers = self._buffers
        weights = buffers["packed_weights"]
        if weights is None:
            return []
        values = self.values
        if not torch.compiler.is_compiling() and not self._pack_is_current():
            return []
        if values.requires_grad and torch.is_grad_enabled():
            return []
        return [weights, buffers["packed_channels"], buffers["packed_tap_ptr"]]  # type: ignore[list-item]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.drop_packed()
        elif not self._pack_is_current():
            self.prepack()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.values.device.type, self.values.dtype
        self.drop_packed()
        super()._apply(fn, recurse)
        if (self.values.device.type, self.values.dtype) != before:
            self.kernel = "auto"
        if not self.training:
            self.prepack()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_messages = args[-1]
        names = ("values", "crow_indices", "col_indices")
        incoming = [state_dict.get(prefix + name) for name in names]
        if all(isinstance(t, Tensor) for t in incoming) and incoming[0].shape == self.values.shape:  # type: ignore[union-attr]
            try:
                BSRWeight(*incoming, self.weight_bsr().weight_shape, self.block_shape).validate()  # type: ignore[arg-type]
            except (ValueError, TypeError) as error:
                error_messages.append(f"{prefix.rstrip('.')}: {error}")
                return
        self.drop_packed()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.training:
            self.prepack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._pack_is_current():
            state["_buffers"] = {k: None if k in self._packed_names else v for k, v in self._buffers.items()}
        state["_packed_from"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._buffers["packed_weights"] is not None:
            self._packed_from = self.values.detach(), _version(self.values)

    def _repr_tail(self) -> str:
        blocks = self.weight_bsr().nnz_blocks
        return (
            f"bias={self.bias is not None}, block_shape={self.block_shape}, blocks={blocks}, "
            f"epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class BlockSparseConv2d(_BlockSparse):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding) that stores and multiplies the stored blocks only.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as ``nn.Conv2d``.
        block_shape: ``(block_out, block_in)``.
        crow_indices, col_indices: the pattern, see `slimkernels.formats.BSRWeight`.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``, fused behind the bias.
        kernel: a kernel's name, or ``auto``.

    Parameters ``values (blocks, block_out, block_in)`` and ``bias (out_channels,)``, zero until assigned; `from_dense` fills them.

    Raises:
        ValueError, TypeError: an invalid pattern, epilogue or block shape.
    """

    _op = "bsr_conv2d"
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, bias: bool = True, *,
        block_shape: Sequence[int], crow_indices: Tensor, col_indices: Tensor, epilogue: str = "none", kernel: str = "auto",
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self._init_weight(
            (out_channels, in_channels, *self.kernel_size), block_shape, crow_indices, col_indices, bias, epilogue, kernel, device, dtype
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, block_shape: Sequence[int], mask: Tensor | None = None, epilogue: str = "none", kernel: str = "auto"
    ) -> BlockSparseConv2d:
        """The block-sparse twin of a convolution; ``mask`` (block_rows, block_cols) from its zeros if None.

        Raises:
            ValueError: groups, padding_mode or padding without a twin (named with its value), or a mask of the wrong shape.
        """
        reason = unsupported_conv_reason(conv)
        if reason is not None:
            raise ValueError(f"BlockSparseConv2d.from_dense: {reason}")
        weight = BSRWeight.from_dense(conv.weight, block_shape, mask)
        module = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, resolved_padding(conv), conv.dilation,  # type: ignore[arg-type]
            conv.bias is not None, block_shape=block_shape, crow_indices=weight.crow_indices, col_indices=weight.col_indices,
            epilogue=epilogue, kernel=kernel, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        module._assign(weight, conv)
        return module

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution with the same weight and bias; a fused epilogue is not part of it."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.weight_bsr().to_dense())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return OPS.bsr_conv2d.default(
            x, self.values, self.crow_indices, self.col_indices, self.bias, self._packed(), self.weight_shape, self.block_shape,
            self.stride, self.padding, self.dilation, self.epilogue, self.kernel,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, {self._repr_tail()}"
        )


class BlockSparseLinear(_BlockSparse):
    """Drop-in for ``nn.Linear`` that stores and multiplies the stored blocks only.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        block_shape: ``(block_out, block_in)``.
        crow_indices, col_indices: the pattern, see `slimkernels.formats.BSRWeight`.
        epilogue: ``none`` or ``relu``.
        kernel: a kernel's name, or ``auto``.

    Raises:
        ValueError, TypeError: an invalid pattern, epilogue or block shape.
    """

    _op = "bsr_linear"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, block_shape: Sequence[int], crow_indices: Tensor,
        col_indices: Tensor, epilogue: str = "none", kernel: str = "auto", device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight(
            (out_features, in_features), block_shape, crow_indices, col_indices, bias, epilogue, kernel, device, dtype
        )

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, block_shape: Sequence[int], mask: Tensor | None = None, epilogue: str = "none", kernel: str = "auto"
    ) -> BlockSparseLinear:
        """The block-sparse twin of a linear layer; ``mask`` (block_rows, block_cols) from its zeros if None.

        Raises:
            ValueError: a mask of the wrong shape. TypeError: a weight that is not floating point.
        """
        weight = BSRWeight.from_dense(linear.weight, block_shape, mask)
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, block_shape=block_shape,
            crow_indices=weight.crow_indices, col_indices=weight.col_indices, epilogue=epilogue, kernel=kernel,
            device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        module._assign(weight, linear)
        return module

    def to_dense(self) -> nn.Linear:
        """The dense linear layer with the same weight and bias; a fused epilogue is not part of it."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight_bsr().to_dense()[:, :, 0, 0])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return OPS.bsr_linear.default(
            x, self.values, self.crow_indices, self.col_indices, self.bias, self._packed(), self.weight_shape, self.block_shape,
            self.epilogue, self.kernel,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_tail()}"


class LowRankLinear(nn.Module):
    """Drop-in for ``nn.Linear``: ``y = epilogue((x V^T) U^T + bias)`` with U ``(out, rank)`` and V ``(rank, in)``."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, *, epilogue: str = "none", kernel: str = "auto",
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"LowRankLinear: expected rank in [1, {min(in_features, out_features)}], got {rank}")
        _check_epilogue("LowRankLinear", "low_rank_linear", epilogue)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.epilogue, self.kernel = epilogue, kernel
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        # Kaiming's bound for the product: var(U V x) = rank * var(U) * in * var(V) * var(x).
        nn.init.normal_(self.U, std=rank**-0.5)
        nn.init.normal_(self.V, std=in_features**-0.5)

    @classmethod
    def from_factors(
        cls, U: Tensor, V: Tensor, bias: Tensor | None = None, epilogue: str = "none", kernel: str = "auto"
    ) -> LowRankLinear:
        """The layer with the given factors (copied). Raises ValueError where they do not chain."""
        LowRankWeight("svd", (V, U)).validate()
        module = cls(V.shape[1], U.shape[0], U.shape[1], bias is not None, epilogue=epilogue, kernel=kernel,
                     device=U.device, dtype=U.dtype)  # fmt: skip
        with torch.no_grad():
            module.U.copy_(U)
            module.V.copy_(V)
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    @classmethod
    def from_dense(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The best rank-``rank`` approximation (truncated SVD in float64, singular values split evenly, Eckart-Young)."""
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(
                f"LowRankLinear.from_dense: expected rank in [1, {min(linear.weight.shape)}], got {rank}"
            )
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
        return OPS.low_rank_linear.default(x, self.U, self.V, self.bias, self.epilogue, self.kernel)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


class LowRankConv2d(nn.Module):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding): a chain of factor convolutions, bias after the last.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: of the merged convolution.
        kind: ``svd`` (RxS then 1x1), ``tai`` (Rx1 then 1xS) or ``tucker2`` (1x1, RxS, 1x1).
        ranks: ``(rank,)``, for ``tucker2`` ``(rank_in, rank_out)``.
        epilogue: ``none`` or ``relu``.
        kernel: a kernel's name, or ``auto``.

    ``factors`` is the ``nn.ParameterList`` of the ordered convolution weights.
    """

    groups = 1
    padding_mode = "zeros"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, bias: bool = True, *, kind: str,
        ranks: Sequence[int], epilogue: str = "none", kernel: str = "auto", device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in LOW_RANK_KINDS:
            raise ValueError(f"LowRankConv2d: expected kind in {LOW_RANK_KINDS}, got {kind!r}")
        if len(ranks) != (2 if kind == "tucker2" else 1) or min(ranks) < 1:
            raise ValueError(
                f"LowRankConv2d: expected {'(rank_in, rank_out)' if kind == 'tucker2' else '(rank,)'}, got {tuple(ranks)}"
            )
        _check_epilogue("LowRankConv2d", "low_rank_conv2d", epilogue)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.kind, self.ranks, self.epilogue, self.kernel = kind, tuple(int(r) for r in ranks), epilogue, kernel
        r, s = self.kernel_size
        shapes = {
            "svd": [(ranks[0], in_channels, r, s), (out_channels, ranks[0], 1, 1)],
            "tai": [(ranks[0], in_channels, r, 1), (out_channels, ranks[0], 1, s)],
            "tucker2": [(ranks[0], in_channels, 1, 1), (ranks[-1], ranks[0], r, s), (out_channels, ranks[-1], 1, 1)],
        }[kind]
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes
        )
        for factor in self.factors:
            nn.init.normal_(factor, std=factor[0].numel() ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, factors: Sequence[Tensor], bias: Tensor | None = None, *, kind: str, stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, epilogue: str = "none", kernel: str = "auto",
    ) -> LowRankConv2d:  # fmt: skip
        """The layer with the given factors (copied). Raises ValueError where they do not chain or fit ``kind``."""
        LowRankWeight(kind, tuple(factors)).validate()
        kernel_size = max(f.shape[2] for f in factors), max(f.shape[3] for f in factors)
        module = cls(
            factors[0].shape[1], factors[-1].shape[0], kernel_size, stride, padding, dilation, bias is not None, kind=kind,
            ranks=[f.shape[0] for f in factors[:-1]], epilogue=epilogue, kernel=kernel, device=factors[0].device,
            dtype=factors[0].dtype,
        )  # fmt: skip
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
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, device=self.factors[0].device, dtype=self.factors[0].dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.weight_low_rank().to_dense())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return OPS.low_rank_conv2d.default(
            x, list(self.factors), self.bias, self.stride, self.padding, self.dilation, self.kind, self.epilogue, self.kernel
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, kind={self.kind!r}, ranks={self.ranks}, "
            f"bias={self.bias is not None}, epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )
