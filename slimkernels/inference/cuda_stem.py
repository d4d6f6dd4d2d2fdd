"""A dense convolution of images and the block-sparse one behind it, as one CUDA launch. On explicit request only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkernels.kernels import cuda_tensor_cores, resident_plan
from slimkernels.nn import BlockSparseConv2d, FusedConv2d
from slimkernels.nn.attributes import conv_geometry, unsupported_conv_reason
from slimkernels.tensors import Snapshots

MOST_CHANNELS = 4  # of an image


class CudaStem:
    """Two convolutions in one launch; `stem_of` makes it. It holds a copy of their weights, packed.

    Attributes:
        tensors: of the modules, which were packed.
    """

    def __init__(self, first: nn.Conv2d | FusedConv2d, second: BlockSparseConv2d, config: dict[str, int]) -> None:
        found = (first.weight, second.values, second.crow_indices, second.col_indices, first.bias, second.bias)
        self.tensors: list[Tensor] = [tensor for tensor in found if tensor is not None]
        self._packed_from = Snapshots(self.tensors)
        self._config, self._epilogue = config, second.epilogue
        self._shapes = second.weight_shape, second.block_shape
        weight, values, crow, col, first_bias, bias = (None if t is None else t.detach() for t in found)
        assert weight is not None and values is not None and crow is not None and col is not None
        self._weights = weight, first_bias, values, crow, col, bias
        self._pack = cuda_tensor_cores.pack_stem(weight, values, crow, col, *self._shapes, config.get("variant"))

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` through both layers: ``(N, C_out, P, Q)``, channels_last, without a gradient.

        Raises:
            ValueError, TypeError: as `slimkernels.kernels.cuda_tensor_cores.launch_stem_conv2d`.
            RuntimeError: a weight was written since the stem was made, or the kernel cannot run here.
        """
        if not self._packed_from.hold():
            raise RuntimeError("stem_of: a weight was written since the stem was made: make it anew")
        return cuda_tensor_cores.launch_stem_conv2d(
            x.detach(), *self._weights, self._pack, *self._shapes, self._epilogue, self._config
        )

    def obstacle(self, x: Tensor) -> str | None:
        """Why the kernel does not take a batch of images of the weights' dtype; None where it does."""
        n, channels, h, w = x.shape
        if min(n, w) < 1 or channels != 3 or w % 2 != 0:
            return f"the kernel takes images of 3 channels and an even width, not {tuple(x.shape)}"
        if self._epilogue == "relu_maxpool2" and min(h, w) < 2:
            return f"the kernel takes images that can be pooled, not {tuple(x.shape)}"
        limits = cuda_tensor_cores._limits(x)
        variant = self._config.get("variant", int(limits.wgmma))
        steps = int(self._pack.most_steps[0])
        if resident_plan.plan_stem(variant, n, h, w, steps, limits.shared_memory, limits.processors) is None:
            return f"the kernel takes images whose rows fit shared memory, not {tuple(x.shape)}"
        return None


def stem_of(first: nn.Conv2d | FusedConv2d, second: BlockSparseConv2d, *, relu: bool = True, **config: int) -> CudaStem:
    """A dense convolution of images, its ReLU, and the block-sparse convolution of that, as one launch.

    What was fused into the second one (bias, ReLU, 2x2 max-pool) stays so. Waits for the device. On an H200 it took
    longer than the two layers one after the other: docs/gpu.md.

    Args:
        first: ``nn.Conv2d`` or `FusedConv2d`, 3 to 64 channels, 3x3, stride and padding 1, in bf16 or fp16.
        second: 64 to at most 64 channels, 3x3, stride and padding 1, in blocks of 64 x multiples of 16.
        relu: whether a ReLU stands between the two; a `FusedConv2d` may have its own.
        config: as `slimkernels.kernels.cuda_tensor_cores.launch_stem_conv2d` has it.

    Raises:
        ValueError: layers that the kernel does not take.
    """
    reason = stem_reason(first, second, relu)
    if reason is not None:
        raise ValueError(f"stem_of: {reason}")
    return CudaStem(first, second, config)


def stem_reason(first: nn.Conv2d | FusedConv2d, second: BlockSparseConv2d, relu: bool) -> str | None:
    """Why two convolutions, perhaps with a ReLU between them, are no stem for the kernel; None where they are."""
    epilogue = first.epilogue if isinstance(first, FusedConv2d) else "none"
    if epilogue == "relu_maxpool2":
        return "a max-pool stands between the two"
    if epilogue == "none" and not relu:
        return "no ReLU stands between the two"
    dtypes = first.weight.dtype, second.values.dtype
    if dtypes[0] != dtypes[1] or dtypes[0] not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 or bfloat16, not {dtypes[0]} and {dtypes[1]}"
    weights = first.weight, first.bias, second.values, second.crow_indices, second.col_indices, second.bias
    shapes = second.weight_shape, second.block_shape
    try:  # without images the launcher checks all else, and launches nothing
        cuda_tensor_cores.launch_stem_conv2d(first.weight.new_empty(0, 3, 2, 2), *weights, [], *shapes, second.epilogue)
    except ValueError as error:
        return str(error)
    if isinstance(first, nn.Conv2d):
        reason = unsupported_conv_reason(first)
        if reason is not None:
            return reason
        _, *geometry = conv_geometry(first)
    else:
        geometry = [first.stride, first.padding, first.dilation]
    for of in (geometry, [second.stride, second.padding, second.dilation]):
        if any(pair != (1, 1) for pair in of):
            return f"the kernel takes stride, padding and dilation 1, not {', '.join(map(str, of))}"
    return None
