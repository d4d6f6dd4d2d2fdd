"""The table of kernels: dispatch, tests and benchmarks iterate over ``KERNELS``; what is not listed cannot run.

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
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu import gradients as cpu_gradients
from slimkernels.kernels.cpu import low_rank as native_low_rank
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
GRADIENT_OPS = ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad", "relu_maxpool2_backward", "low_rank_linear_dgrad")
EPILOGUES = {
    "bsr_conv2d": frozenset({"none", "relu", "relu_maxpool2"}),
    "bsr_linear": frozenset({"none", "relu"}),
    "low_rank_linear": frozenset({"none", "relu"}),
    "low_rank_conv2d": frozenset({"none", "relu"}),
    "fused_conv2d": frozenset({"none", "relu", "relu_maxpool2"}),
    **{op: frozenset({"none"}) for op in GRADIENT_OPS},
}
ALL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def _one_config(problem: SizedProblem) -> Sequence[Mapping[str, int]]:
    return ({},)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    Attributes:
        name: key in ``KERNELS``, ``<op>[_<dtype>]__<backend or isa>``.
        op: the op it implements, one of ``OPS``, ``DENSE_OPS`` or ``GRADIENT_OPS``.
        backend: ``reference``, ``cpu``, ``triton`` or ``cuda``.
        isa: CPU instruction set it needs, None elsewhere.
        dtypes: dtypes of activations and weights.
        epilogues: epilogues it fuses.
        devices: device types of its tensors.
        launch: the op's arguments without ``kernel`` -> output tensor; takes ``config=`` where ``configs`` gives any.
        available: None when this machine can run it, else why not.
        shape_reason: None when it takes the problem's shapes, else why not.
        configs: launch configurations worth trying on a problem, the likeliest first; ``{}`` is the launcher's default.
        explicit_only: why ``auto`` never takes it, None where it may.
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

    def supports(self, problem: Problem) -> str | None:
        """None when the kernel takes this problem, else the reason why not."""
        if problem.op != self.op:
            return f"implements {self.op}, not {problem.op}"
        if problem.device not in self.devices:
            return f"runs on {'/'.join(sorted(self.devices))} tensors, not {problem.device}"
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(sorted(str(d) for d in self.dtypes))}, not {problem.dtype}"
        if problem.epilogue not in self.epilogues:
            return f"has no epilogue {problem.epilogue!r}"
        return self.shape_reason(problem)


def _lazy(module: str, function: str) -> Callable[..., Any]:
    """A function of a module imported at the first call: Triton and CUDA stay unloaded until their kernels run."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"slimkernels.kernels.{module}"), function)(*args, **kwargs)

    return call


def _always() -> None:
    return None


def _rows() -> list[KernelSpec]:
    rows = [
        KernelSpec(f"{op}__reference", op, "reference", None, ALL_DTYPES, EPILOGUES[op], frozenset({"cpu", "cuda"}),
                   getattr(reference, op), _always)
        for op in OPS + DENSE_OPS + GRADIENT_OPS
    ]  # fmt: skip
    for isa in ("avx512", "avx2", "scalar"):
        for op, launch in (
            ("bsr_conv2d", native.launch_bsr_conv2d),
            ("bsr_linear", native.launch_bsr_linear),
            ("low_rank_linear", native_low_rank.launch_low_rank_linear),
            ("low_rank_conv2d", native_low_rank.launch_low_rank_conv2d),
        ):
            rows.append(
                KernelSpec(f"{op}_f32__{isa}", op, "cpu", isa, frozenset({torch.float32}), EPILOGUES[op],
                           frozenset({"cpu"}), partial(launch, isa), partial(native.unavailable_reason, isa),
                           partial(native_obstacle, isa))
            )  # fmt: skip
    fp32, cpu = frozenset({torch.float32}), frozenset({"cpu"})
    for isa in ("avx512", "avx2", "scalar"):
        op, launch = "bsr_conv2d_dgrad", partial(cpu_gradients.launch_dgrad, isa)
        rows.append(
            KernelSpec(f"{op}_f32__{isa}", op, "cpu", isa, fp32, EPILOGUES[op], cpu, launch,
                       partial(native.unavailable_reason, isa))
        )  # fmt: skip
    op = "bsr_conv2d_wgrad"
    rows.append(
        KernelSpec(f"{op}_f32__cpu", op, "cpu", None, fp32, EPILOGUES[op], cpu, cpu_gradients.launch_wgrad, _always)
    )
    half = frozenset({torch.float32, torch.bfloat16, torch.float16})
    rows += _triton_forward_rows(half)
    relu = frozenset({"none", "relu"})
    for op, module, function in (
        ("low_rank_linear", "triton.low_rank_linear", "launch"),
        ("low_rank_conv2d", "triton.low_rank_conv2d", "launch"),
        ("low_rank_linear_dgrad", "triton.low_rank_linear", "launch_dgrad"),
        ("bsr_conv2d_dgrad", "triton.bsr_conv2d_backward_x", "launch"),
        ("bsr_conv2d_wgrad", "triton.bsr_conv2d_backward_w", "launch"),
        ("relu_maxpool2_backward", "triton.relu_maxpool2_backward", "launch"),
    ):
        rows.append(
            KernelSpec(f"{op}__triton", op, "triton", None, half, EPILOGUES[op], frozenset({"cuda", "cpu"}),
                       _lazy(module, function), _lazy("triton.runtime", "available"),
                       _lazy("triton.runtime", "shape_reason"),
                       _lazy(module, "device_configs") if op == "low_rank_linear" else _one_config)
        )  # fmt: skip
    for op in OPS:
        rows.append(
            KernelSpec(f"{op}__cuda", op, "cuda", None, half, relu, frozenset({"cuda"}), _lazy("cuda", f"launch_{op}"),
                       _lazy("cuda", "available"))
        )  # fmt: skip
    rows.append(
        KernelSpec("bsr_conv2d__cuda_tensor_cores", "bsr_conv2d", "cuda", None,
                   frozenset({torch.bfloat16, torch.float16}), EPILOGUES["bsr_conv2d"], frozenset({"cuda"}),
                   _lazy("cuda_tensor_cores", "launch_bsr_conv2d"), _lazy("cuda", "available"),
                   _lazy("cuda_tensor_cores", "shape_reason"),
                   explicit_only="it has not been measured to be the fastest on any GPU")
    )  # fmt: skip
    return rows + _fused_rows(half)


def _fused_rows(dtypes: frozenset[torch.dtype]) -> list[KernelSpec]:
    """Dense convolutions with an epilogue: of few input channels by Triton, of any with a ReLU by cuDNN."""
    op = "fused_conv2d"
    return [
        KernelSpec(f"{op}__triton", op, "triton", None, dtypes, EPILOGUES[op], frozenset({"cuda", "cpu"}),
                   _lazy("triton.fused_conv2d", "launch"), _lazy("triton.runtime", "available"),
                   _lazy("triton.fused_conv2d_config", "shape_reason"),
                   _lazy("triton.fused_conv2d_config", "device_configs")),
        KernelSpec(f"{op}__cudnn", op, "cuda", None, dtypes, frozenset({"relu", "relu_maxpool2"}), frozenset({"cuda"}),
                   _lazy("cudnn", "launch_fused_conv2d"), _lazy("cudnn", "available")),
    ]  # fmt: skip


def _triton_forward_rows(dtypes: frozenset[torch.dtype]) -> list[KernelSpec]:
    """The kernels of `triton.bsr_conv2d`; the first is the one that a call without sizes gets."""
    rows = []
    for variant, reason in (
        ("pixels_on_m", "triton.runtime.shape_reason"),
        ("weights_on_m", "triton.runtime.shape_reason"),
        ("images_on_m", "triton.bsr_conv2d_config.images_reason"),
        ("taps_together", "triton.bsr_conv2d_config.taps_together_reason"),
        ("shared_input", "triton.bsr_conv2d_config.shared_input_reason"),
    ):
        for op, function in (("bsr_conv2d", "launch"), ("bsr_linear", "launch_linear")):
            if op == "bsr_linear" and variant in ("taps_together", "images_on_m"):
                continue
            name = f"{op}__triton" + ("" if variant == "pixels_on_m" else f"_{variant}")
            rows.append(
                KernelSpec(name, op, "triton", None, dtypes, EPILOGUES[op], frozenset({"cuda", "cpu"}),
                           partial(_lazy("triton.bsr_conv2d", function), variant=variant),
                           _lazy("triton.runtime", "available"), _lazy(*reason.rsplit(".", 1)),
                           partial(_lazy("triton.bsr_conv2d_config", "device_configs"), variant),
                           explicit_only="its speed hangs on the pattern" if variant == "shared_input" else None)
            )  # fmt: skip
    return rows


KERNELS: dict[str, KernelSpec] = {spec.name: spec for spec in _rows()}

__all__ = [
    "DENSE_OPS",
    "EPILOGUES",
    "GRADIENT_OPS",
    "KERNELS",
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
