"""The table of kernels, one row each: dispatch, tests and benchmarks iterate over it; what is not listed cannot run.

A kernel's ``launch`` takes its op's arguments without ``kernel`` and returns the output. It makes no choice and checks
nothing that the op has checked; `slimkernels.dispatch.select` chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimkernels.kernels import reference
from slimkernels.kernels.cpu import batch_norm as cpu_batch_norm
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu import gradients as cpu_gradients
from slimkernels.kernels.cpu import low_rank as native_low_rank
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import (
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    Problem,
    Request,
    SizedProblem,
    native_obstacle,
)

OPS = ("bsr_conv2d", "bsr_linear", "low_rank_linear", "low_rank_conv2d")
# Layers that stay dense, with what follows them in the same kernel.
DENSE_OPS = ("fused_conv2d",)
# What gradients are made of; a block-sparse linear layer is the convolution of single pixels.
GRADIENT_OPS = (
    "bsr_conv2d_dgrad",
    "bsr_conv2d_wgrad",
    "bsr_conv2d_bias_grad",
    "relu_maxpool2_backward",
    "low_rank_linear_dgrad",
)
# Batch norm of a training step with what is behind it, forward and backward.
NORM_OPS = ("batch_norm_forward", "batch_norm_backward")
EPILOGUES = {
    "bsr_conv2d": frozenset({"none", "relu", "relu_maxpool2"}),
    "bsr_linear": frozenset({"none", "relu"}),
    "low_rank_linear": frozenset({"none", "relu"}),
    "low_rank_conv2d": frozenset({"none", "relu"}),
    "fused_conv2d": frozenset({"none", "relu", "relu_maxpool2"}),
    **{op: frozenset({"none"}) for op in GRADIENT_OPS},
    **{op: frozenset({"none", "relu", "relu_maxpool2"}) for op in NORM_OPS},
}
ALL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def _one_config(problem: SizedProblem) -> Sequence[Mapping[str, int]]:
    return ({},)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    Attributes:
        name: key in ``KERNELS``, ``<op>[_<dtype>]__<backend or isa>``.
        op: the op it implements, one of ``OPS``, ``DENSE_OPS``, ``GRADIENT_OPS`` or ``NORM_OPS``.
        backend: ``reference``, ``cpu``, ``triton`` or ``cuda``.
        isa: CPU instruction set it needs, None elsewhere.
        dtypes: dtypes of activations and weights.
        epilogues: epilogues it fuses.
        devices: device types of its tensors.
        launch: the op's arguments without ``kernel`` -> output tensor; takes ``config=`` where ``configs`` gives any.
        available: None when this machine can run it, else why not.
        shape_reason: None when it takes the problem's shapes, else why not.
        precision_reason: None when torch's switches of precision, as they stand, let it compute in the problem's dtype,
            else why not. A launcher looks again in every call: a switch may change.
        configs: launch configurations worth trying on a problem, the likeliest first; ``{}`` is the launcher's default.
        explicit_only: why ``auto`` never takes it, None where it may.
        on_tensor_cores: whether it is a low-rank kernel of CUDA C++ that multiplies a problem on tensor cores.
        obstacle: of a gradient, None when ``launch`` takes these very arguments, which fit together, else why not.
    """

    name: str
    op: str
    backend: str
    isa: str | None
    dtypes: frozenset[torch.dtype]
    epilogues: frozenset[str]
    devices: frozenset[str]
    launch: Callable[..., Tensor]
    available: Callable[[], str | None]
    shape_reason: Callable[[Problem], str | None] = lambda problem: None
    configs: Callable[[SizedProblem], Sequence[Mapping[str, int]]] = _one_config
    explicit_only: str | None = None
    on_tensor_cores: Callable[[SizedProblem], bool] = lambda problem: False
    obstacle: Callable[..., str | None] = lambda *arguments: None
    precision_reason: Callable[[Problem], str | None] = lambda problem: None

    @property
    def one_position(self) -> bool:
        """Whether a tile is one output position of many images, and taps outside the image are left out."""
        return self.name.endswith("_images_on_m")

    def supports(self, problem: Problem) -> str | None:
        """None when the kernel takes this problem as torch's switches stand, else the reason why not."""
        return self.takes(problem) or self.precision_reason(problem)

    def takes(self, problem: Problem) -> str | None:
        """None when the kernel takes this problem where torch's switches let it, else the reason why not."""
        if problem.op != self.op:
            return f"implements {self.op}, not {problem.op}"
        if problem.device not in self.devices:
            return f"runs on {'/'.join(sorted(self.devices))} tensors, not {problem.device}"
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(sorted(str(d) for d in self.dtypes))}, not {problem.dtype}"
        if problem.epilogue not in self.epilogues:
            return f"has no epilogue {problem.epilogue!r}"
        return self.shape_reason(problem)


def _lazy(name: str) -> Callable[..., Any]:
    """A function whose module is imported at the first call: Triton and CUDA stay unloaded until their kernels run.

    Args:
        name: dotted, inside this package: ``triton.runtime.available``.
    """
    module, _, function = name.rpartition(".")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"slimkernels.kernels.{module}"), function)(*args, **kwargs)

    return call


def _always() -> None:
    return None


_FP32 = frozenset({torch.float32})
_HALF = frozenset({torch.bfloat16, torch.float16})
_CPU, _CUDA, _ANYWHERE = frozenset({"cpu"}), frozenset({"cuda"}), frozenset({"cpu", "cuda"})
_RELU = frozenset({"none", "relu"})


def _reference(name: str) -> KernelSpec:
    """The plain definition of an op, in any dtype anywhere."""
    op = name.removesuffix("__reference")
    return KernelSpec(
        name, op, "reference", None, ALL_DTYPES, EPILOGUES[op], _ANYWHERE, getattr(reference, op), _always
    )


def _cpu(name: str, launch: Callable[..., Any], reason: Callable[..., str | None] | None = None) -> KernelSpec:
    """A C++ kernel of the instruction set that the name ends in, which ``launch`` and ``reason`` take first."""
    op, isa = name.split("_f32__")
    kept: dict[str, Any] = {} if reason is None else {"shape_reason": partial(reason, isa)}
    available = partial(unavailable_reason, isa)
    return KernelSpec(name, op, "cpu", isa, _FP32, EPILOGUES[op], _CPU, partial(launch, isa), available, **kept)


def _triton(
    name: str,
    launch: str,
    reason: str = "triton.runtime.shape_reason",
    configs: str | None = None,
    variant: str = "",
    explicit_only: str | None = None,
) -> KernelSpec:
    """A Triton kernel by dotted names in this package; ``variant``: of the block-sparse forward launchers."""
    function = _lazy(launch)
    found: Callable[..., Sequence[Mapping[str, int]]] = _one_config if configs is None else _lazy(configs)
    if variant:
        function, found = partial(function, variant=variant), partial(found, variant)
    op = name.split("__")[0]
    return KernelSpec(
        name,
        op,
        "triton",
        None,
        _FP32 | _HALF,
        EPILOGUES[op],
        _ANYWHERE,
        function,
        _lazy("triton.runtime.available"),
        _lazy(reason),
        found,
        explicit_only,
    )


def _block_sparse(name: str, variant: str, reason: str, explicit_only: str | None = None) -> KernelSpec:
    """A forward kernel of `triton.bsr_conv2d`."""
    launch = "triton.bsr_conv2d." + ("launch" if name.startswith("bsr_conv2d") else "launch_linear")
    return _triton(name, launch, reason, "triton.bsr_conv2d_config.device_configs", variant, explicit_only)


def _cuda(
    name: str,
    launch: str,
    available: str = "cuda.available",
    dtypes: frozenset[torch.dtype] = _FP32 | _HALF,
    epilogues: frozenset[str] = _RELU,
    reason: str | None = None,
    explicit_only: str | None = None,
    tensor_cores: str | None = None,
    obstacle: str | None = None,
    precision: str | None = None,
) -> KernelSpec:
    """A CUDA C++ kernel of ours, or one of a vendor's library, by dotted names in this package."""
    op = name.split("__")[0]
    kept: dict[str, Any] = {} if reason is None else {"shape_reason": _lazy(reason)}
    if tensor_cores is not None:
        kept["on_tensor_cores"] = _lazy(tensor_cores)
    if obstacle is not None:
        kept["obstacle"] = _lazy(obstacle)
    if precision is not None:
        kept["precision_reason"] = _lazy(precision)
    return KernelSpec(
        name,
        op,
        "cuda",
        None,
        dtypes,
        epilogues,
        _CUDA,
        _lazy(launch),
        _lazy(available),
        **kept,
        explicit_only=explicit_only,
    )


_ANY_SHAPE = "triton.runtime.shape_reason"
_CONFIG = "triton.bsr_conv2d_config"
_BY_PATTERN = "its speed hangs on the pattern"
# As measured on an H200 (docs/gpu.md).
_BEHIND = "on an H200 auto's kernels are faster over a whole network"
_RARELY_AHEAD = "on an H200 it was the fastest way for few layers"

# One row a kernel. Of an op's kernels on one backend the first is the one that a call without sizes gets.
_ROWS = (
    _reference("bsr_conv2d__reference"),
    _reference("bsr_linear__reference"),
    _reference("low_rank_linear__reference"),
    _reference("low_rank_conv2d__reference"),
    _reference("fused_conv2d__reference"),
    _reference("bsr_conv2d_dgrad__reference"),
    _reference("bsr_conv2d_wgrad__reference"),
    _reference("bsr_conv2d_bias_grad__reference"),
    _reference("relu_maxpool2_backward__reference"),
    _reference("low_rank_linear_dgrad__reference"),
    _reference("batch_norm_forward__reference"),
    _reference("batch_norm_backward__reference"),
    #
    _cpu("bsr_conv2d_f32__avx512", native.launch_bsr_conv2d, native_obstacle),
    _cpu("bsr_conv2d_f32__avx2", native.launch_bsr_conv2d, native_obstacle),
    _cpu("bsr_conv2d_f32__scalar", native.launch_bsr_conv2d, native_obstacle),
    _cpu("bsr_linear_f32__avx512", native.launch_bsr_linear, native_obstacle),
    _cpu("bsr_linear_f32__avx2", native.launch_bsr_linear, native_obstacle),
    _cpu("bsr_linear_f32__scalar", native.launch_bsr_linear, native_obstacle),
    _cpu("low_rank_linear_f32__avx512", native_low_rank.launch_low_rank_linear, native_obstacle),
    _cpu("low_rank_linear_f32__avx2", native_low_rank.launch_low_rank_linear, native_obstacle),
    _cpu("low_rank_linear_f32__scalar", native_low_rank.launch_low_rank_linear, native_obstacle),
    _cpu("low_rank_conv2d_f32__avx512", native_low_rank.launch_low_rank_conv2d, native_obstacle),
    _cpu("low_rank_conv2d_f32__avx2", native_low_rank.launch_low_rank_conv2d, native_obstacle),
    _cpu("low_rank_conv2d_f32__scalar", native_low_rank.launch_low_rank_conv2d, native_obstacle),
    _cpu("bsr_conv2d_dgrad_f32__avx512", cpu_gradients.launch_dgrad),
    _cpu("bsr_conv2d_dgrad_f32__avx2", cpu_gradients.launch_dgrad),
    _cpu("bsr_conv2d_dgrad_f32__scalar", cpu_gradients.launch_dgrad),
    _cpu("bsr_conv2d_wgrad_f32__avx512", cpu_gradients.launch_wgrad),
    _cpu("bsr_conv2d_wgrad_f32__avx2", cpu_gradients.launch_wgrad),
    _cpu("bsr_conv2d_wgrad_f32__scalar", cpu_gradients.launch_wgrad),
    _cpu("batch_norm_forward_f32__avx512", cpu_batch_norm.launch_forward),
    _cpu("batch_norm_forward_f32__avx2", cpu_batch_norm.launch_forward),
    _cpu("batch_norm_forward_f32__scalar", cpu_batch_norm.launch_forward),
    _cpu("batch_norm_backward_f32__avx512", cpu_batch_norm.launch_backward),
    _cpu("batch_norm_backward_f32__avx2", cpu_batch_norm.launch_backward),
    _cpu("batch_norm_backward_f32__scalar", cpu_batch_norm.launch_backward),
    # Matrix products of torch, for machines without the extension.
    KernelSpec(
        "bsr_conv2d_wgrad_f32__cpu",
        "bsr_conv2d_wgrad",
        "cpu",
        None,
        _FP32,
        EPILOGUES["bsr_conv2d_wgrad"],
        _CPU,
        cpu_gradients.wgrad_by_products,
        _always,
    ),
    #
    _block_sparse("bsr_conv2d__triton", "pixels_on_m", _ANY_SHAPE),
    _block_sparse("bsr_conv2d__triton_weights_on_m", "weights_on_m", _ANY_SHAPE),
    _block_sparse("bsr_conv2d__triton_images_on_m", "images_on_m", f"{_CONFIG}.images_reason"),
    _block_sparse("bsr_conv2d__triton_taps_together", "taps_together", f"{_CONFIG}.taps_together_reason"),
    _block_sparse("bsr_conv2d__triton_shared_input", "shared_input", f"{_CONFIG}.shared_input_reason", _BY_PATTERN),
    _block_sparse("bsr_linear__triton", "pixels_on_m", _ANY_SHAPE),
    _block_sparse("bsr_linear__triton_weights_on_m", "weights_on_m", _ANY_SHAPE),
    _block_sparse("bsr_linear__triton_shared_input", "shared_input", f"{_CONFIG}.shared_input_reason", _BY_PATTERN),
    _triton(
        "low_rank_linear__triton", "triton.low_rank_linear.launch", configs="triton.low_rank_linear.device_configs"
    ),
    _triton("low_rank_conv2d__triton", "triton.low_rank_conv2d.launch"),
    _triton("low_rank_linear_dgrad__triton", "triton.low_rank_linear.launch_dgrad"),
    _triton("bsr_conv2d_dgrad__triton", "triton.bsr_conv2d_backward_x.launch"),
    _triton("bsr_conv2d_wgrad__triton", "triton.bsr_conv2d_backward_w.launch"),
    _triton("bsr_conv2d_bias_grad__triton", "triton.sums.launch"),
    _triton("relu_maxpool2_backward__triton", "triton.relu_maxpool2_backward.launch"),
    _triton("batch_norm_forward__triton", "triton.batch_norm.launch_forward"),
    _triton("batch_norm_backward__triton", "triton.batch_norm.launch_backward"),
    # Few input channels; any number of them goes to cuDNN below.
    _triton(
        "fused_conv2d__triton",
        "triton.fused_conv2d.launch",
        "triton.fused_conv2d_config.shape_reason",
        "triton.fused_conv2d_config.device_configs",
    ),
    #
    _cuda("bsr_conv2d__cuda", "cuda.launch_bsr_conv2d"),
    _cuda("bsr_linear__cuda", "cuda.launch_bsr_linear"),
    _cuda(
        "low_rank_linear__cuda",
        "cuda_low_rank.launch_low_rank_linear",
        explicit_only=_RARELY_AHEAD,
        tensor_cores="cuda_low_rank.on_tensor_cores",
    ),
    _cuda("low_rank_conv2d__cuda", "cuda.launch_low_rank_conv2d"),
    _cuda(
        "low_rank_conv2d__cuda_tensor_cores",
        "cuda_low_rank.launch_low_rank_conv2d",
        dtypes=_HALF,
        reason="cuda_low_rank.conv_reason",
        explicit_only=_RARELY_AHEAD,
        tensor_cores="cuda_low_rank.on_tensor_cores",
    ),
    _cuda(
        "bsr_conv2d__cuda_tensor_cores",
        "cuda_tensor_cores.launch_bsr_conv2d",
        epilogues=EPILOGUES["bsr_conv2d"],
        reason="cuda_tensor_cores.shape_reason",
        precision="tf32.precision_reason",
        explicit_only=_BEHIND,
    ),
    _cuda(
        "bsr_conv2d_dgrad__cuda_tensor_cores",
        "cuda_input_gradient.launch_dgrad",
        dtypes=_HALF,
        epilogues=EPILOGUES["bsr_conv2d_dgrad"],
        reason="cuda_gradients.shape_reason",
        explicit_only=_BEHIND,
        obstacle="cuda_input_gradient.dgrad_obstacle",
    ),
    _cuda(
        "bsr_conv2d_wgrad__cuda_tensor_cores",
        "cuda_gradients.launch_wgrad",
        dtypes=_HALF,
        epilogues=EPILOGUES["bsr_conv2d_wgrad"],
        reason="cuda_gradients.shape_reason",
        explicit_only=_BEHIND,
        obstacle="cuda_gradients.wgrad_obstacle",
    ),
    _cuda(
        "fused_conv2d__cudnn",
        "cudnn.launch_fused_conv2d",
        "cudnn.available",
        epilogues=frozenset({"relu", "relu_maxpool2"}),
    ),
)
KERNELS: dict[str, KernelSpec] = {spec.name: spec for spec in _ROWS}

__all__ = [
    "DENSE_OPS",
    "EPILOGUES",
    "GRADIENT_OPS",
    "KERNELS",
    "NORM_OPS",
    "OPS",
    "ConvProblem",
    "FusedConvProblem",
    "KernelSpec",
    "LinearProblem",
    "LowRankConvProblem",
    "LowRankLinearProblem",
    "Problem",
    "Request",
]
