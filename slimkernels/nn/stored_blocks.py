"""What the block-sparse modules share: their stored blocks, what follows from the pattern, and the kernels' packs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.dispatch.select import resolve, takes
from slimkernels.formats import BSRWeight, block_shape_2d, check_pattern
from slimkernels.kernels import cuda_tensor_cores
from slimkernels.kernels.cpu.conv2d import PackedConv2d, pack_strips
from slimkernels.kernels.cpu.pairs import engine
from slimkernels.kernels.packs import ForwardOrder, StripPack, TensorCorePack
from slimkernels.kernels.problems import Request, strip_width
from slimkernels.kernels.transposed import transpose_index
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order
from slimkernels.nn.packing import Prepacked
from slimkernels.ops.library import nothing_watches

_STRIPS = tuple(f"packed_{name}" for name in StripPack._fields)
_TENSOR_CORES = tuple(f"tensor_core_{name}" for name in TensorCorePack._fields)


class StoredBlocks(Prepacked):
    """The weight's tensors, their transposed index and their order, beside the pack of `Prepacked`.

    The transposed index (`slimkernels.kernels.transposed`) serves the gradient of the input. It follows the pattern
    alone, is a buffer outside of the state dict, and is rewritten in place when the pattern changes. So is the order in
    which the Triton kernels take block rows and blocks (`forward_order`), which they are given in the place of a pack.
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
    _prepared: PackedConv2d | None
    _fixed = frozenset({"weight_shape", "block_shape"})
    _pack_buffers = (_STRIPS, _TENSOR_CORES)

    def _init_weight(
        self,
        weight_shape: Sequence[int],
        block_shape: Sequence[int],
        indices: tuple[Tensor, Tensor],
        bias: bool,
        epilogue: str,
        kernel: str,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        self.weight_shape = tuple(int(d) for d in weight_shape)
        self.block_shape = block_shape_2d(block_shape)
        self.epilogue, self.kernel = epilogue, kernel
        self._check_attributes()
        for name, index in zip(("crow_indices", "col_indices"), indices):
            self.register_buffer(name, index.to(device=device, dtype=torch.int32))
        blocks = self.col_indices.numel()
        self.values = nn.Parameter(torch.zeros(blocks, *self.block_shape, device=device, dtype=dtype))
        zeros = torch.zeros(self.weight_shape[0], device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._init_packing()
        self.weight_bsr().validate()
        self.register_buffer("transposed", self._transposed_index(), persistent=False)
        self.register_buffer("order", self._order(), persistent=False)

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        """``(weight_shape 4-D, stride, padding, dilation)``."""
        raise NotImplementedError

    def weight_bsr(self) -> BSRWeight:
        """The weight as a `BSRWeight` that shares this module's tensors."""
        c_out, c_in, r, s = (*self.weight_shape, 1, 1)[:4]
        return BSRWeight(self.values, self.crow_indices, self.col_indices, (c_out, c_in, r, s), self.block_shape)

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

    # ------------------------------------------------------------ what follows from the pattern

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
        super()._attributes_changed()

    def _index_for_gradients(self) -> Tensor | None:
        """The transposed index where a backward may follow; exported and traced programs do not carry it."""
        recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
        return self.transposed if torch.is_grad_enabled() and not recorded else None

    # ------------------------------------------------------------ the pack

    def _weights(self) -> list[Tensor]:
        values = self._parameters.get("values")
        return [self.values if values is None else values]  # computed where they are parametrized or pruned

    def _pack_follows(self) -> list[Tensor]:
        buffers = self._buffers
        # For mypy: none of them is ever None.
        return [*self._weights(), buffers["crow_indices"], buffers["col_indices"]]  # type: ignore[list-item]

    def _hold(self) -> None:
        super()._hold()
        crow, col = self.crow_indices, self.col_indices
        counted = not (crow.is_inference() or col.is_inference())
        self._packed_pattern = crow, col, crow._version + col._version if counted else None

    def _ready(self, x: Tensor) -> PackedConv2d | None:
        # As the base's, with the one weight by name: 2% of a call of a small layer.
        ready, parameters = self._prepared, self._parameters
        # A parametrized or pruned tensor is no parameter: the op is given what is computed.
        if ready is None or "values" not in parameters or "bias" not in parameters:
            return None
        if not nothing_watches(x, parameters["values"], parameters["bias"]):
            return None
        return ready if self._pack_is_current() else None

    def _pack_is_current(self) -> bool:
        packed_from = self._packed_from
        if packed_from is None:
            return False
        # The indices by identity and count of writes alone: two more snapshots would take 0.5 us of every call.
        crow, col, writes = self._packed_pattern
        buffers, values = self._buffers, self._parameters.get("values")
        return (
            values is not None
            and buffers["crow_indices"] is crow
            and buffers["col_indices"] is col
            and (writes is None or crow._version + col._version == writes)
            and packed_from[0].holds(values)
        )

    def _request(self) -> Request:
        return Request(self._op, self.values.dtype, self.values.device.type, self.block_shape, self.epilogue)

    def _isa(self) -> str | None:
        try:
            return resolve(self.kernel, self._request()).isa
        except ValueError:  # the forward says why
            return None

    def _moved(self) -> None:
        """Warns where no kernel but the reference, which multiplies the zeros, takes this dtype on this device."""
        if self.values.is_meta or self.values.dtype not in (torch.float16, torch.bfloat16):
            return  # who asks for float64 wants digits
        try:
            slow = resolve("auto", self._request()).backend == "reference"
            faster = slow and resolve("auto", self._request()._replace(dtype=torch.float32)).backend != "reference"
        except ValueError:  # the forward says why
            return
        if faster:
            warnings.warn(
                f"{type(self).__name__}: {str(self.values.dtype).removeprefix('torch.')} has no sparse kernel on "
                f"{self.values.device.type}, so zeros are multiplied and nothing is gained; convert in the dtype that "
                "serves, or go back to float32 with model.float()" + _in_bf16(self.values),
                stacklevel=3,
            )

    def _wants_tensor_cores(self) -> bool:
        """Whether the module's calls take the tensor-core kernel, which runs on explicit request.

        Torch's switches of precision are not asked: they may change while the pack, which no other kernel reads, stays.
        """
        return self.kernel == cuda_tensor_cores.NAME and takes(self.kernel, self._request())

    def _make_pack(self) -> Mapping[str, Tensor] | None:
        w = self.weight_bsr()
        weight = w.values, w.crow_indices, w.col_indices, w.weight_shape, w.block_shape
        if self._wants_tensor_cores():
            return dict(zip(_TENSOR_CORES, cuda_tensor_cores.pack(*weight)))
        isa = self._isa() if w.values.is_cpu else None
        return None if isa is None else dict(zip(_STRIPS, pack_strips(*weight, strip_width(self.block_shape[0], isa))))

    def _make_call(self) -> PackedConv2d | None:
        """As ``kernel="auto"`` and the environment answer now."""
        isa = self._isa()
        if isa is None:
            return None
        pack: list[Any] = [self._buffers[name] for name in _STRIPS]
        return PackedConv2d(isa, StripPack(*pack), *self._call_geometry(), self.epilogue, self._op)

    def _restore(self) -> None:
        if self._held() == _TENSOR_CORES:
            self.prepack()  # other GPUs want other packs
        else:
            super()._restore()

    def _packed(self) -> list[Tensor]:
        if not self._held() and self.values.is_cuda and not torch.compiler.is_exporting():
            return [*ForwardOrder(self.order)]
        return super()._packed()

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

    def _repr_tail(self) -> str:
        blocks = self.weight_bsr().nnz_blocks
        return (
            f"bias={self.bias is not None}, block_shape={self.block_shape}, blocks={blocks}, "
            f"epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


def _in_bf16(values: Tensor) -> str:
    """What a CPU that multiplies bf16 offers float32 models."""
    if values.device.type != "cpu" or engine() is None:
        return ""
    return ", which is multiplied in bf16 where torch.backends.mkldnn.conv.fp32_precision and .matmul say so"
