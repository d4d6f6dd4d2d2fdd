"""Block-sparse twins of ``nn.Conv2d`` and ``nn.Linear``, and the prepacked weight that they keep in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.formats import BSRWeight, block_shape_2d, check_pattern
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.problems import strip_width
from slimkernels.kernels.transposed import transpose_index
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order
from slimkernels.nn.attributes import AttributesInUse, int_pair, resolved_padding, unsupported_conv_reason
from slimkernels.nn.packed_for_kernel import PackedForKernel
from slimkernels.ops import bsr_conv2d, bsr_linear
from slimkernels.ops.library import nothing_watches
from slimkernels.tensors import Snapshot, is_plain


class _BlockSparse(PackedForKernel, AttributesInUse):
    """What the block-sparse modules share: the weight's tensors, their transposed index, and the kernels' packs.

    The transposed index (`slimkernels.kernels.transposed`) serves the gradient of the input. It follows the pattern
    alone, is a buffer outside of the state dict, and is rewritten in place when the pattern changes. So is the order in
    which the Triton kernels take block rows and blocks (`forward_order`).

    The pack exists in eval mode only. It is dropped by ``train()``, when the module is moved or loaded, and it is
    passed over (the op then packs by itself) when ``values`` or the indices changed since or ``values`` wants a
    gradient. Writing to ``values`` in eval mode is legal; call ``prepack()`` afterwards to be fast again, and always
    after an in-place write through ``values.data``, which torch does not count. Assigning to ``stride``, ``padding``,
    ``dilation``, ``epilogue`` or ``kernel`` builds the pack anew. A compiled module reads the pack of frozen values
    only, and sees writes to those after ``prepack()``; an exported program never sees them.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    transposed: Tensor
    order: Tensor
    weight_shape: tuple[int, ...]
    block_shape: tuple[int, int]
    epilogue: str
    kernel: str
    _fixed = frozenset({"weight_shape", "block_shape"})
    _strip_names = ("packed_weights", "packed_channels", "packed_tap_ptr")  # of the CPU kernels
    _packed_names = _strip_names + PackedForKernel._tensor_core_names

    def _init_weight(
        self, weight_shape: Sequence[int], block_shape: Sequence[int], crow_indices: Tensor, col_indices: Tensor,
        bias: bool, epilogue: str, kernel: str, device: Any, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.weight_shape = tuple(int(d) for d in weight_shape)
        self.block_shape = block_shape_2d(block_shape)
        self.epilogue, self.kernel = epilogue, kernel
        self._check_attributes()
        self.register_buffer("crow_indices", crow_indices.to(device=device, dtype=torch.int32))
        self.register_buffer("col_indices", col_indices.to(device=device, dtype=torch.int32))
        self.values = nn.Parameter(torch.zeros(col_indices.numel(), *self.block_shape, device=device, dtype=dtype))
        zeros = torch.zeros(self.weight_shape[0], device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        for name in self._packed_names:
            self.register_buffer(name, None, persistent=False)
        self._packed_from: tuple[Snapshot, Tensor, Tensor, int | None] | None = None
        self._prepared: native.PackedConv2d | None = None
        self.weight_bsr().validate()
        self.register_buffer("transposed", self._transposed_index(), persistent=False)
        self.register_buffer("order", self._order(), persistent=False)

    def _transposed_index(self) -> Tensor:
        weight_shape, stride, _, dilation = self._call_geometry()
        return transpose_index(self.crow_indices, self.col_indices, weight_shape, self.block_shape, stride, dilation)

    def _order(self) -> Tensor:
        return forward_order(self.crow_indices, self.col_indices, self._call_geometry()[0], self.block_shape)

    def pattern_changed(self) -> None:
        """To be called when ``crow_indices`` or ``col_indices`` were written to: renews what follows from them.

        Raises:
            ValueError: indices that break a rule of `slimkernels.formats.BSRWeight`.
        """
        self.drop_packed()
        check_pattern(type(self).__name__, self.crow_indices, self.col_indices, self.weight_shape, self.block_shape)
        self.transposed.copy_(self._transposed_index())
        self.order.copy_(self._order())
        if not self.training:
            self.prepack()

    def _attributes_changed(self) -> None:
        self.drop_packed()
        self.transposed = self._transposed_index()
        if not self.training:
            self.prepack()

    def _index_for_gradients(self) -> Tensor | None:
        """The transposed index where a backward may follow; exported and traced programs do not carry it."""
        recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
        return self.transposed if torch.is_grad_enabled() and not recorded else None

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
        """Builds the prepacked weight of the present values where a kernel of this machine uses one. Eval mode only."""
        self.drop_packed()
        values = self.values
        if self.training or not is_plain(values) or type(values.data) is not Tensor:
            return
        if self._wants_tensor_cores():
            self._pack_for_tensor_cores()
            self._remember_source()
            return
        isa = self._isa() if values.is_cpu else None
        if isa is None:
            return
        weight = self.weight_bsr()
        # Torch counts no writes to tensors made in inference mode, and a pack with uncounted writes is checked anew.
        with torch.inference_mode(False), torch.no_grad():
            packed = native.pack_strips(
                values, self.crow_indices, self.col_indices, weight.weight_shape, self.block_shape,
                strip_width(self.block_shape[0], isa),
            )  # fmt: skip
        for name, tensor in zip(self._strip_names, packed):
            setattr(self, name, tensor)
        self._prepare(isa)

    def _prepare(self, isa: str) -> None:
        """Keeps the packed weight as a ready call; ``kernel="auto"`` and the environment were asked now."""
        packed: list[Any] = [self._buffers[name] for name in self._strip_names]
        self._prepared = native.PackedConv2d(isa, packed, *self._call_geometry(), self.epilogue, self._op)
        self._remember_source()

    def _remember_source(self) -> None:
        """Notes what was packed, so that later writes to it are seen."""
        crow, col = self.crow_indices, self.col_indices
        counted = not (crow.is_inference() or col.is_inference())
        self._packed_from = Snapshot(self.values), crow, col, crow._version + col._version if counted else None

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        """``(weight_shape 4-D, stride, padding, dilation)``."""
        raise NotImplementedError

    def _ready(self, x: Tensor) -> native.PackedConv2d | None:
        """The prepared call, where nothing watches the op and the weight is the one that was packed.

        The op's way costs 60 us a layer on a 2.4 GHz Zen 3, this a third: at batch 1 the difference is what the sparse
        arithmetic of a converted VGG-19 takes.
        """
        if self._prepared is None or not nothing_watches(x, self._parameters["values"], self._parameters["bias"]):
            return None
        return self._prepared if self._pack_is_current() else None

    def drop_packed(self) -> None:
        """Forgets the prepacked weight."""
        for name in self._packed_names:
            setattr(self, name, None)
        self._packed_from = None
        self._prepared = None

    def _pack_is_current(self) -> bool:
        if self._packed_from is None:
            return False
        source, packed_crow, packed_col, versions = self._packed_from
        values, crow, col = self._parameters["values"], self._buffers["crow_indices"], self._buffers["col_indices"]
        return (
            crow is packed_crow
            and col is packed_col
            and (versions is None or crow._version + col._version == versions)
            and values is not None
            and source.holds(values)
        )

    def _packed(self) -> list[Tensor]:
        buffers = self._buffers
        names = next((n for n in (self._strip_names, self._tensor_core_names) if buffers[n[0]] is not None), None)
        if names is None:
            return [self.order] if self.values.is_cuda and not torch.compiler.is_exporting() else []
        values = self.values
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # A recorded program cannot see later writes, so only frozen values may be read through the pack.
            usable = not values.requires_grad
        else:
            usable = self._pack_is_current() and not (values.requires_grad and torch.is_grad_enabled())
        if not usable:
            return []
        return [buffers[name] for name in names]  # type: ignore[misc]

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
            self.kernel = "auto"  # which packs in eval mode
            self._warn_of_reference()
        elif not self.training:
            self.prepack()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_messages = args[-1]
        names = ("values", "crow_indices", "col_indices")
        # A part that the state dict lacks stays, so the parts are checked as they will stand together.
        values, crow_indices, col_indices = (state_dict.get(prefix + name, getattr(self, name)) for name in names)
        tensors = all(isinstance(part, Tensor) for part in (values, crow_indices, col_indices))
        if tensors and values.shape == self.values.shape:
            try:
                shape = self.weight_bsr().weight_shape
                BSRWeight(values, crow_indices, col_indices, shape, self.block_shape).validate()
            except (ValueError, TypeError) as error:
                error_messages.append(f"{prefix.rstrip('.')}: {error}")
                return
        self.drop_packed()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.crow_indices.is_meta:
            if self.transposed.device != self.crow_indices.device:  # loaded with assign=True
                self.transposed, self.order = self._transposed_index(), self._order()
            try:
                self.pattern_changed()
            except ValueError as error:  # a part of another size was left out, which torch reports
                error_messages.append(f"{prefix.rstrip('.')}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._pack_is_current():
            state["_buffers"] = {k: None if k in self._packed_names else v for k, v in self._buffers.items()}
        state["_packed_from"] = state["_prepared"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._buffers["packed_weights"] is not None:
            isa = self._isa()
            if isa is None:
                self.drop_packed()
            else:
                self._prepare(isa)
        elif self._buffers[self._tensor_core_names[0]] is not None:
            self.prepack()

    def _repr_tail(self) -> str:
        blocks = self.weight_bsr().nnz_blocks
        return (
            f"bias={self.bias is not None}, block_shape={self.block_shape}, blocks={blocks}, "
            f"epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


class BlockSparseConv2d(_BlockSparse):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding) that stores and multiplies the stored blocks only.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as ``nn.Conv2d``.
        block_shape: ``(block_out, block_in)``.
        crow_indices, col_indices: the pattern, see `slimkernels.formats.BSRWeight`.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``, fused behind the bias.
        kernel: a kernel's name, or ``auto``.

    Parameters ``values (blocks, block_out, block_in)`` and ``bias (out_channels,)``, zero until assigned; `from_dense`
    fills them.

    Raises:
        ValueError, TypeError: an invalid pattern, epilogue or block shape.
    """

    _op = "bsr_conv2d"
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1,
        bias: bool = True, *, block_shape: Sequence[int], crow_indices: Tensor, col_indices: Tensor,
        epilogue: str = "none", kernel: str = "auto", device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = int_pair(kernel_size), int_pair(stride)
        self.padding, self.dilation = int_pair(padding), int_pair(dilation)
        self._init_weight(
            (out_channels, in_channels, *self.kernel_size), block_shape, crow_indices, col_indices, bias, epilogue,
            kernel, device, dtype,
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        block_shape: Sequence[int],
        mask: Tensor | None = None,
        epilogue: str = "none",
        kernel: str = "auto",
    ) -> BlockSparseConv2d:
        """The block-sparse twin of a convolution; ``mask`` (block_rows, block_cols) from its zeros if None.

        Raises:
            ValueError: groups, padding_mode or padding without a twin (named with its value), or a mask of the wrong
                shape.
        """
        reason = unsupported_conv_reason(conv)
        if reason is not None:
            raise ValueError(f"BlockSparseConv2d.from_dense: {reason}")
        weight = BSRWeight.from_dense(conv.weight, block_shape, mask)
        module = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, resolved_padding(conv), conv.dilation,  # type: ignore[arg-type]
            conv.bias is not None, block_shape=block_shape, crow_indices=weight.crow_indices,
            col_indices=weight.col_indices, epilogue=epilogue, kernel=kernel, device=conv.weight.device,
            dtype=conv.weight.dtype,
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

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        return self.weight_shape, self.stride, self.padding, self.dilation

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt(x, self._parameters["bias"])
            if y is not None:
                return y
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return bsr_conv2d(
            x, self.values, self.crow_indices, self.col_indices, self.bias, self._packed(),
            weight_shape=self.weight_shape, block_shape=self.block_shape, stride=self.stride, padding=self.padding,
            dilation=self.dilation, epilogue=self.epilogue, kernel=self.kernel, transposed=self._index_for_gradients(),
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
        self, in_features: int, out_features: int, bias: bool = True, *, block_shape: Sequence[int],
        crow_indices: Tensor, col_indices: Tensor, epilogue: str = "none", kernel: str = "auto", device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight(
            (out_features, in_features), block_shape, crow_indices, col_indices, bias, epilogue, kernel, device, dtype
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        block_shape: Sequence[int],
        mask: Tensor | None = None,
        epilogue: str = "none",
        kernel: str = "auto",
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

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        return (*self.weight_shape, 1, 1), (1, 1), (0, 0), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt_rows(x, self._parameters["bias"])
            if y is not None:
                return y
        return bsr_linear(
            x, self.values, self.crow_indices, self.col_indices, self.bias, self._packed(),
            weight_shape=self.weight_shape, block_shape=self.block_shape, epilogue=self.epilogue, kernel=self.kernel,
            transposed=self._index_for_gradients(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_tail()}"
