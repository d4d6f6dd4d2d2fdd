"""One linear layer as conversion sees it: its weight, geometry and declared blocks, or why it cannot be taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from slimkernels.conversion.graph import bake, copy_model, has_hooks, parametrized_type
from slimkernels.formats import BlockMask
from slimkernels.nn import (
    BlockSparseConv2d,
    BlockSparseLinear,
    FusedConv2d,
    LowRankConv2d,
    LowRankLinear,
    resolved_padding,
)
from slimkernels.nn.strided_pointwise import PixelsRead

WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
SPARSE_LAYERS = (BlockSparseConv2d, BlockSparseLinear)
LOW_RANK_LAYERS = (LowRankConv2d, LowRankLinear)
FUSED_LAYERS = (FusedConv2d,)
DROP_IN_LAYERS = (*SPARSE_LAYERS, *LOW_RANK_LAYERS, *FUSED_LAYERS)
Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerWeight:
    """A dense linear map: ``conv2d`` for a 4-D weight ``(C_out, C_in, R, S)``, ``linear`` for a 2-D one ``(out, in)``.

    Attributes:
        weight: detached values.
        bias: ``(out,)`` or None.
        stride: of a convolution.
        padding: of a convolution.
        dilation: of a convolution.
        block_shape: declared by a `BlockMask` or a block-sparse module; None where nothing is declared.
        requires_grad: whether the layer's parameters are trainable.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    block_shape: Pair | None = None
    requires_grad: bool = True

    @property
    def is_conv(self) -> bool:
        """Whether the weight is a convolution's."""
        return self.weight.dim() == 4

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight."""
        return self.weight.numel() * self.weight.element_size()

    def to_module(self) -> nn.Conv2d | nn.Linear:
        """The nn.Conv2d or nn.Linear of this weight."""
        module = dense_module(
            tuple(self.weight.shape), self.bias is not None, self.stride, self.padding, self.dilation
        ).to(self.weight.dtype)
        module.weight = nn.Parameter(self.weight, requires_grad=self.requires_grad)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias, requires_grad=self.requires_grad)
        return module


def dense_module(
    weight_shape: tuple[int, ...], bias: bool, stride: Pair, padding: Pair, dilation: Pair
) -> nn.Conv2d | nn.Linear:
    """An nn.Conv2d or nn.Linear of a weight shape, on the meta device: its parameters are put in by the caller."""
    if len(weight_shape) == 2:
        return nn.Linear(weight_shape[1], weight_shape[0], bias, device="meta")
    c_out, c_in, r, s = weight_shape
    return nn.Conv2d(c_in, c_out, (r, s), stride, padding, dilation, bias=bias, device="meta")


def declared_block_shape(module: nn.Module) -> Pair | None:
    """Block shape that a `BlockMask` on the weight declares, or a block-sparse module has."""
    if isinstance(module, SPARSE_LAYERS):
        return module.block_shape
    if parametrize.is_parametrized(module, "weight"):
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        for parametrization in module.parametrizations.weight:  # type: ignore[union-attr, operator]
            if isinstance(parametrization, BlockMask):
                return parametrization.block_shape
    return None


def type_obstacle(module: nn.Module) -> str | None:
    """Why the layer itself cannot be taken; None when it can."""
    if isinstance(module, DROP_IN_LAYERS):
        return None
    kind = parametrized_type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{kind.__name__} has no weights yet"
    if kind not in (nn.Conv2d, nn.Linear):
        base = next((b for b in (nn.Conv2d, nn.Linear) if isinstance(module, b)), None)
        if base is None:
            return f"{kind.__name__} is not supported"
        if kind.forward is not base.forward or getattr(kind, "_conv_forward", None) is not getattr(
            base, "_conv_forward", None
        ):
            return f"{kind.__name__} has its own forward"
        own = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias", "parametrizations"}
        own -= {f"{name}_{part}" for name in ("weight", "bias") for part in ("orig", "mask", "g", "v", "u")}
        if own or kind.get_extra_state is not nn.Module.get_extra_state:
            return f"{kind.__name__} holds more than a weight and a bias"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"groups={module.groups} is not supported"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} is not supported"
        try:
            resolved_padding(module)
        except ValueError as error:
            return str(error)
    return None


def weight_obstacle(weight: Tensor) -> str | None:
    """Why a weight tensor cannot be taken; None when it can."""
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.layout != torch.strided or weight.is_quantized:
        return f"its weight has layout {weight.layout}" if not weight.is_quantized else "its weight is quantized"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def layer_weight(module: nn.Module) -> LayerWeight:
    """The dense weight of a Conv2d, Linear or drop-in layer, masks and parametrizations applied.

    The caller has seen no `type_obstacle`; a weight with a `weight_obstacle` is returned as it is.
    """
    declared = declared_block_shape(module)
    trainable = any(p.requires_grad for p in module.parameters(recurse=True))
    dense: Any = module
    if isinstance(module, DROP_IN_LAYERS):
        dense = module.to_dense()  # type: ignore[operator]  # an attribute of a Module is a Tensor or a Module to mypy
    elif computes_weight(module):
        dense = copy_model(module)
        bake(dense)
    bias = None if dense.bias is None else dense.bias.detach()
    found = LayerWeight(dense.weight.detach(), bias, block_shape=declared, requires_grad=trainable)
    if isinstance(dense, nn.Conv2d):
        found = replace(
            found,
            stride=_pair(dense.stride),
            padding=resolved_padding(dense),
            dilation=_pair(dense.dilation),
        )
    return found


def computes_weight(module: nn.Module) -> bool:
    """Whether a parametrization or one of torch's hooks computes the weight."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, PixelsRead)]
    return parametrize.is_parametrized(module) or (bool(hooks) and not has_hooks(module))


def structure_obstacle(name: str, uniques: Mapping[str, nn.Module], readers: Mapping[str, str]) -> str | None:
    """Why the place of a layer in its model forbids to replace it; None when nothing does.

    ``uniques`` and ``readers`` are `slimkernels.conversion.graph.unique_names` and
    `slimkernels.conversion.readers.weight_readers` of the model.
    """
    if not name:
        return "it is the model itself: put it into an nn.Sequential"
    if name not in uniques:
        return "the module is registered under several names"
    if has_hooks(uniques[name]):
        return "it carries hooks"
    return readers.get(name)
