"""Compiles the Triton low-rank convolution, and the linear layer's gradient, for GPUs that need not be present.

As a script it prints a Markdown table (`--all` for every kernel, `--summary` for one line, `--json` for machines);
test_triton_low_rank.py runs it in a process of its own, because a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton_compile_check import DTYPES, LIMITS, artefacts, compile_kernel, main

from slimkernels.kernels.triton import low_rank_conv2d as triton_low_rank_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton.runtime import power_of_2_divisor


@dataclass(frozen=True)
class Target:
    """One kernel to compile. kind: ``fused`` (RxS and 1x1), ``alone`` (one factor) or ``dgrad`` of the linear layer."""

    arch: int
    dtype: str
    kind: str
    rank: int
    precision: str = "ieee"
    m_total: int = 65536
    c_in: int = 256
    index_64: bool = False

    @property
    def name(self) -> str:
        extras = [self.precision] if self.dtype == "fp32" else []
        extras += ["64-bit"] if self.index_64 else []
        extras += [] if self.c_in == 256 else [f"c_in={self.c_in}"]
        extras += [] if self.m_total == 65536 else [f"M={self.m_total}"]
        return f"sm_{self.arch} {self.dtype} {', '.join([f'low_rank {self.kind} r={self.rank}', *extras])}"

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32" or self.precision == "tf32"


def quick() -> list[Target]:
    """The kernels of the default test run."""
    return [
        *(Target(arch, "bf16", kind, 64) for arch in LIMITS for kind in ("fused", "alone", "dgrad")),
        Target(90, "fp32", "fused", 64),
    ]


def everything() -> list[Target]:
    """Every kind of kernel, dtype and compile-time branch, on every GPU."""
    targets = []
    for arch in LIMITS:
        for kind in ("fused", "alone", "dgrad"):
            targets += [Target(arch, "bf16", kind, rank) for rank in (16, 64, 128, 256)]
            targets += [Target(arch, "fp16", kind, 64), Target(arch, "bf16", kind, 64, m_total=32)]
            targets += [Target(arch, "fp32", kind, rank) for rank in (16, 64, 256)]
            targets += [Target(arch, "fp32", kind, rank, precision="tf32") for rank in (64, 256)]
            targets += [Target(arch, "bf16", kind, 64, index_64=True), Target(arch, "bf16", kind, 48, c_in=200)]
            targets += [Target(arch, "bf16", kind, rank, c_in=c) for rank in (16, 256) for c in (201, 202)]
    return targets


def compile_target(target: Target) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel and its tile constants, with the argument hints that a launch derives."""
    shared_memory, processors = LIMITS[target.arch]
    limits = {
        "tensor_cores": target.tensor_cores, "shared_memory": shared_memory, "processors": processors,
    }  # fmt: skip
    dtype: torch.dtype = DTYPES[target.dtype]
    common = {"HAS_BIAS": target.kind != "dgrad", "RELU": target.kind != "dgrad", "INDEX_64": target.index_64}
    common["ALIGN"] = power_of_2_divisor(target.c_in, 16)
    if target.kind == "dgrad":
        kernel = triton_low_rank_linear.low_rank_linear_fwd_kernel
        config = triton_low_rank_linear.default_config(
            target.m_total, 1024, target.rank, dtype, in_features=target.c_in, **limits
        )
        constants = {**common, "ONE_TILE": True, "STORE_INNER": True}
    else:
        kernel = triton_low_rank_conv2d.low_rank_conv2d_fwd_kernel
        outer = 256 if target.kind == "fused" else None
        config = triton_low_rank_conv2d.default_config(
            target.m_total, target.rank, outer, dtype, c_in=target.c_in, **limits
        )
        taps = {"R": 3, "S": 3, "PAD_H": 1, "PAD_W": 1}
        taps |= dict.fromkeys(("STRIDE_H", "STRIDE_W", "DIL_H", "DIL_W"), 1)
        constants = {**common, **taps, "FUSED": target.kind == "fused"}
    constants |= {name: config[name] for name in ("RANK", "BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants |= {"PRECISION": target.precision, "EVEN_K": target.c_in % config["BLOCK_K"] == 0}
    pointers = {name: f"*{target.dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    # in_features is the only size of the linear kernel that follows c_in; others are multiples of 16 here.
    ragged = {"rank", "inner"} if target.rank % 16 else set()
    ragged |= {"c_in", "in_features"} if target.c_in % 16 else set()
    aligned = {*pointers, "in_features", "out_features", "rank", "c_in", "inner", "c_out"} - ragged
    return compile_kernel(kernel, constants, pointers, aligned, config, target.arch), config


def measure(target: Target) -> dict[str, Any]:
    """Compiles one target; what the artefacts say, as plain data."""
    return artefacts(target, *compile_target(target))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, quick, everything)
