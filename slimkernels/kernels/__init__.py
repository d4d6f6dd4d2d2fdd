"""The table of kernels: dispatch, tests and benchmarks iterate over ``KERNELS``; what is not listed cannot run.

A kernel's ``launch`` takes its op's arguments without ``kernel`` and returns the output. It makes no choice and checks
nothing that the op has checked; `slimkernels.kernels.select` chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimkernels.kernels import native, reference
from slimkernels.kernels.problems import (
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    Problem,
    Request,
)

OPS = ("bsr_conv2d", "bsr_linear", "low_rank_linear", "low_rank_conv2d")
EPILOGUES = {
    "bsr_conv2d": frozenset({"none", "relu", "relu_maxpool2"}),
    "bsr_linear": frozenset({"none", "relu"}),
    "low_rank_linear": frozenset({"none", "relu"}),
    "low_rank_conv2d": frozenset({"none", "relu"}),
}
ALL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    Attributes:
        name: key in ``KERNELS``, ``<op>[_<dtype>]__<backend or isa>``.
        op: the op it implements, one of ``OPS``.
        backend: ``reference``, ``cpu``, ``triton`` or ``cuda``.
        isa: CPU instruction set it needs, None elsewhere.
        dtypes: dtypes of activations and weights.
        epilogues: epilogues it fuses.
        devices: device types of its tensors.
        launch: the op's arguments without ``kernel`` -> output tensor.
        available: None when this machine can run it, else why not.
        shape_reason: None when it takes the problem's block shape, else why not.
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
        for op in OPS
    ]  # fmt: skip
    for isa in ("avx512", "avx2", "scalar"):
        for op, launch in (("bsr_conv2d", native.launch_bsr_conv2d), ("bsr_linear", native.launch_bsr_linear)):
            rows.append(
                KernelSpec(f"{op}_f32__{isa}", op, "cpu", isa, frozenset({torch.float32}), EPILOGUES[op],
                           frozenset({"cpu"}), partial(launch, isa), partial(native.unavailable_reason, isa),
                           native.shape_reason)
            )  # fmt: skip
    half = frozenset({torch.float32, torch.bfloat16, torch.float16})
    relu = frozenset({"none", "relu"})
    for op, module, function in (
        ("bsr_conv2d", "triton.bsr_conv2d", "launch"),
        ("bsr_linear", "triton.bsr_conv2d", "launch_linear"),
        ("low_rank_linear", "triton.low_rank_linear", "launch"),
    ):
        rows.append(
            KernelSpec(f"{op}__triton", op, "triton", None, half, EPILOGUES[op], frozenset({"cuda", "cpu"}),
                       _lazy(module, function), _lazy("triton.runtime", "available"),
                       _lazy("triton.runtime", "shape_reason"))
        )  # fmt: skip
    for op in OPS:
        rows.append(
            KernelSpec(f"{op}__cuda", op, "cuda", None, half, relu, frozenset({"cuda"}), _lazy("cuda", f"launch_{op}"),
                       _lazy("cuda", "available"))
        )  # fmt: skip
    return rows


KERNELS: dict[str, KernelSpec] = {spec.name: spec for spec in _rows()}

__all__ = [
    "EPILOGUES",
    "KERNELS",
    "OPS",
    "ConvProblem",
    "KernelSpec",
    "LinearProblem",
    "LowRankConvProblem",
    "LowRankLinearProblem",
    "Problem",
    "Request",
]
