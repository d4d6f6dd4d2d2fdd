"""Compiles the Triton kernels of the gradients for GPUs that need not be present, and reads what came out.

Run by test_triton_backward.py in a process of its own; as a script it prints a Markdown table (`--all` for every
kernel, `--summary` for one line, `--json` for machines).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton_compile_check import DEVICES, DTYPES, LIMITS, artefacts, compile_kernel, main

from slimkernels.kernels.triton import (
    batch_norm,
    bsr_conv2d_backward_w,
    bsr_conv2d_backward_x,
    relu_maxpool2_backward,
    sums,
)
from slimkernels.kernels.triton.runtime import cdiv, power_of_2_divisor

C_OUT = 256
# Batch norm: the kernel and its epilogue.
BATCH_NORM = {
    f"batch norm {kernel}{' pool' if epilogue == 2 else ''}": (kernel, epilogue)
    for epilogue in (1, 2)
    for kernel in ("moments", "statistics", "apply", "reduce", "input_gradient")
    if epilogue == 1 or kernel not in ("moments", "statistics")
}


@dataclass(frozen=True)
class Target:
    """One kernel to compile: ``dgrad``, ``wgrad`` or ``pool`` of a 3x3 convolution of 256 channels, 87.5% sparse."""

    kind: str
    arch: int
    dtype: str
    shape: tuple[int, int] = (128, 32)
    precision: str = "ieee"
    m_total: int = 65536
    stride: int = 1
    border: bool = True
    index_64: bool = False
    channels: int = C_OUT
    kernel: int = 3

    @property
    def name(self) -> str:
        block = "" if self.kind == "pool" else f" {self.shape[0]}x{self.shape[1]}"
        extras = [self.precision] if self.dtype == "fp32" and block else []
        extras += [f"stride {self.stride}"] if self.stride > 1 else []
        extras += [] if self.border else ["no border"]
        extras += ["64-bit"] if self.index_64 else []
        extras += [] if self.kernel == 3 else [f"{self.kernel}x{self.kernel}"]
        extras += [] if self.channels == C_OUT else [f"channels={self.channels}"]
        extras += [] if self.m_total == 65536 else [f"M={self.m_total}"]
        return f"sm_{self.arch} {self.dtype} {', '.join([self.kind + block, *extras])}"

    @property
    def tensor_cores(self) -> bool:
        return self.kind in ("dgrad", "wgrad") and (self.dtype != "fp32" or self.precision == "tf32")


def quick() -> list[Target]:
    """The kernels of the default test run: both gradients and the pooling on every architecture."""
    targets = [
        Target(kind, arch, "bf16") for arch in LIMITS for kind in ("dgrad", "wgrad", "pool", "bias", "add", *BATCH_NORM)
    ]
    return [
        *targets,
        Target("dgrad", 90, "fp16", (64, 16), stride=2),
        Target("wgrad", 90, "fp16", (64, 16), index_64=True),
        Target("dgrad", 80, "fp32", (64, 16)),
        Target("wgrad", 80, "fp32", (64, 16)),
    ]


def everything() -> list[Target]:
    """Every block shape, dtype and compile-time branch on every architecture."""
    targets = []
    for arch in LIMITS:
        for kind in ("dgrad", "wgrad"):
            shapes = [(1, 1), (8, 1), (16, 1), (16, 16), (32, 32), (64, 16), (64, 32), (64, 64)]
            shapes += [(128, 16), (128, 32), (128, 64), (128, 128), (256, 16)]
            targets += [Target(kind, arch, "bf16", shape) for shape in shapes]
            targets += [Target(kind, arch, "fp16", shape) for shape in ((64, 16), (128, 32))]
            targets += [Target(kind, arch, "fp32", shape) for shape in ((1, 1), (16, 1), (64, 16), (128, 128))]
            targets += [Target(kind, arch, "fp32", s, precision="tf32") for s in ((16, 1), (16, 16), (128, 32))]
            targets += [Target(kind, arch, "bf16", stride=2), Target(kind, arch, "bf16", border=False)]
            targets += [Target(kind, arch, "bf16", index_64=True, channels=200), Target(kind, arch, "bf16", m_total=64)]
            targets += [Target(kind, arch, "bf16", (24, 24), channels=48)]
            targets += [Target(kind, arch, "bf16", shape, kernel=7) for shape in ((16, 16), (128, 32))]
        targets += [Target(kind, arch, dtype) for kind in ("pool", "bias", "add") for dtype in DTYPES]
    return targets


def _dgrad(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_out, block_in = target.shape
    shared_memory, processors = LIMITS[target.arch]
    classes = target.stride**2
    config = bsr_conv2d_backward_x.default_config(
        target.m_total,
        cdiv(target.channels, block_in) * classes,
        target.shape,
        target.channels,
        DTYPES[target.dtype],
        tensor_cores=target.tensor_cores,
        index_64=target.index_64,
        shared_memory=shared_memory,
        processors=processors,
    )
    constants = {
        **dict.fromkeys(("dil_h", "dil_w", "pad_h", "pad_w"), 1),
        **dict.fromkeys(("STRIDE_H", "STRIDE_W"), target.stride),
        **dict.fromkeys(("R", "S"), target.kernel if target.border else 1),
        "BLOCK_ROWS": cdiv(target.channels, block_out),
        "BSR_OUT": block_out,
        "BSR_IN": block_in,
        "SLICE": min(power_of_2_divisor(n, config["BLOCK_K"]) for n in (block_out, target.channels)),
        "ALIGN_IN": power_of_2_divisor(block_in, 16),
        "TAP_BITS": target.border and target.kernel**2 <= bsr_conv2d_backward_x.MAX_TAP_BITS,
        "RAGGED_OUT": target.channels % block_out != 0,
    }
    return bsr_conv2d_backward_x.bsr_conv2d_bwd_x_kernel, constants, config


def _wgrad(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_out, block_in = target.shape
    shared_memory, processors = LIMITS[target.arch]
    rows = cdiv(target.channels, block_out)
    config = bsr_conv2d_backward_w.default_config(
        target.m_total,
        max(1, rows * 9 * cdiv(target.channels, block_in) // 8),
        rows,
        target.shape,
        (target.channels, target.channels),
        DTYPES[target.dtype],
        tensor_cores=target.tensor_cores,
        shared_memory=shared_memory,
        processors=processors,
    )
    constants = {
        **dict.fromkeys(("dil_h", "dil_w"), 1),
        **dict.fromkeys(("stride_h", "stride_w"), target.stride),
        **dict.fromkeys(("pad_h", "pad_w"), int(target.border)),
        "S": target.kernel,
        "GROUPS": cdiv(target.channels, block_in),
        "BSR_OUT": block_out,
        "BSR_IN": block_in,
        "SLICE": min(power_of_2_divisor(n, config["BLOCK_M"]) for n in (block_in, target.channels)),
        "ALIGN_OUT": min(power_of_2_divisor(n, config["BLOCK_N"]) for n in (block_out, target.channels)),
        "HAS_BORDER": target.border,
        "RAGGED_IN": target.channels % block_in != 0,
        "ROWS_TILE": 1 << (rows - 1).bit_length(),
    }
    return bsr_conv2d_backward_w.bsr_conv2d_bwd_w_kernel, constants, config


def _pool(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    config = {"BLOCK": relu_maxpool2_backward.BLOCK, "num_warps": 4, "num_stages": 3}
    return relu_maxpool2_backward.relu_maxpool2_bwd_kernel, {"BLOCK": config["BLOCK"]}, config


def _bias(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    plan, _ = sums._channel_plan(target.m_total, target.channels, target.index_64, LIMITS[target.arch][1])
    return plan.kernel, plan.constants, {**plan.constants, **plan.options}


def _add(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    device = DEVICES[target.arch]
    plan = sums._add_plan(target.channels * target.channels, 32, target.channels // 128, 128 * 16, device)
    return plan.kernel, plan.constants, {**plan.constants, **plan.options}


def _batch_norm(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    kernel, epilogue = BATCH_NORM[target.kind]
    image = 32 if target.m_total % 1024 == 0 else 1
    n = target.m_total // image**2
    shape, device = (n, target.channels, image, image), DEVICES[target.arch]
    plan = getattr(batch_norm._plan(*shape, epilogue, True, 1e-5, device), kernel)
    return plan.kernel, {**plan.constants}, {**plan.constants, **plan.options}


def compile_target(target: Target) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel and its tile constants, with the argument hints that a launch derives."""
    kinds = {
        "dgrad": _dgrad,
        "wgrad": _wgrad,
        "pool": _pool,
        "bias": _bias,
        "add": _add,
        **dict.fromkeys(BATCH_NORM, _batch_norm),
    }
    kernel, constants, config = kinds[target.kind](target)
    constants.setdefault("OVERLAP", 2 if DEVICES[target.arch].overlaps else 0)
    constants.update(INDEX_64=target.index_64, PRECISION=target.precision)
    constants.update({name: config.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")})
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    dtype = "fp32" if target.kind == "wgrad" and config["SPLITS"] > 1 else target.dtype
    pointers = dict.fromkeys(("dy_ptr", "x_ptr", "values_ptr", "dx_ptr", "grad_ptr", "y_ptr"), f"*{target.dtype}")
    pointers |= dict.fromkeys(("crow_ptr", "block_ptr", "col_ptr"), "*i32") | {
        "out_ptr": f"*{dtype}",
        **dict.fromkeys(("partial_ptr", "statistics_ptr", "sums_ptr", "weight_ptr", "bias_ptr"), "*fp32"),
    }
    aligned = {"out_stride"} | ({"c_in", "c_out", "channels"} if target.channels % 16 == 0 else set())
    # The transposed index is one tensor: its parts start anywhere.
    aligned |= {name for name, kind in pointers.items() if kind != "*i32"}
    return compile_kernel(kernel, constants, pointers, aligned, config, target.arch), config


def measure(target: Target) -> dict[str, Any]:
    """Compiles one target; what the artefacts say, as plain data."""
    return artefacts(target, *compile_target(target))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, quick, everything)
