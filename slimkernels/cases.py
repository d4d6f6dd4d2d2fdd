"""One problem with its seeded inputs, run through any kernel of the table and checked. For tests and benchmarks only.

>>> result = assert_matches_reference("bsr_conv2d__reference", ConvCase(c_in=64, c_out=64, block_shape=(16, 1)))
>>> result.worst_over_bound < 1
True
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels import (
    KERNELS,
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
)
from slimkernels.testing import UNIT_ROUNDOFF, Comparison, assert_close, random_bsr, random_tensor

Pair: TypeAlias = tuple[int, int]


def to_device(value: Any, device: str) -> Any:
    """Tensors, weights and sequences of them on ``device``; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, BSRWeight):
        moved = {f: getattr(value, f).to(device) for f in ("values", "crow_indices", "col_indices")}
        return replace(value, **moved)
    return type(value)(to_device(v, device) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ConvCase:
    """A block-sparse convolution: sizes, pattern (`testing.random_bsr`) and seed."""

    name: str = "conv"
    n: int = 2
    c_in: int = 16
    h: int = 8
    w: int = 8
    c_out: int = 32
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    block_shape: Pair = (16, 1)
    sparsity: float = 0.875
    pattern: str = "random"
    bias: bool = True
    epilogue: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    op: ClassVar[str] = "bsr_conv2d"

    def weight(self) -> BSRWeight:
        """The weight on the CPU."""
        shape = (self.c_out, self.c_in, *self.kernel_size)
        return random_bsr(shape, self.block_shape, self.sparsity, self.seed, dtype=self.dtype, pattern=self.pattern)

    def inputs(self) -> tuple[Tensor, BSRWeight, Tensor | None]:
        """``(x channels_last, weight, bias or None)`` on the CPU."""
        x = random_tensor(self.n, self.c_in, self.h, self.w, seed=self.seed + 1, dtype=self.dtype)
        bias = random_tensor(self.c_out, seed=self.seed + 2, dtype=self.dtype) if self.bias else None
        return x.contiguous(memory_format=torch.channels_last), self.weight(), bias

    def launch_args(self, x: Tensor, weight: BSRWeight, bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of a `KernelSpec.launch` of this op, without a pack."""
        return (
            x,
            weight.values,
            weight.crow_indices,
            weight.col_indices,
            bias,
            [],
            list(weight.weight_shape),
            list(self.block_shape),
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.epilogue,
        )

    def expected(self, x: Tensor, weight: BSRWeight, bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The float64 reference and the keyword arguments of `testing.assert_close` for it."""
        args = (x, weight, bias, *self.geometry())
        scale, terms = testing.scale_bsr_conv2d(*args)
        bound = {"scale": scale, "terms": terms, "block_shape": self.block_shape}
        return testing.reference_bsr_conv2d(*args), bound

    def geometry(self) -> tuple[Pair, Pair, Pair, str]:
        """``(stride, padding, dilation, epilogue)``."""
        return self.stride, self.padding, self.dilation, self.epilogue

    def problem(self, device: str = "cpu") -> ConvProblem:
        """The case as the dispatcher sees it."""
        return ConvProblem(
            self.n,
            self.c_in,
            self.h,
            self.w,
            self.c_out,
            *self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.block_shape,
            self.weight().nnz_blocks,
            self.dtype,
            device,
            self.epilogue,
        )


@dataclass(frozen=True)
class LinearCase:
    """A block-sparse linear layer over ``m`` rows."""

    name: str = "linear"
    m: int = 5
    in_features: int = 32
    out_features: int = 48
    block_shape: Pair = (16, 1)
    sparsity: float = 0.75
    pattern: str = "random"
    bias: bool = True
    epilogue: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    op: ClassVar[str] = "bsr_linear"

    def weight(self) -> BSRWeight:
        """The weight on the CPU."""
        shape = (self.out_features, self.in_features)
        return random_bsr(shape, self.block_shape, self.sparsity, self.seed, dtype=self.dtype, pattern=self.pattern)

    def inputs(self) -> tuple[Tensor, BSRWeight, Tensor | None]:
        """``(x (m, in), weight, bias or None)`` on the CPU."""
        x, weight = random_tensor(self.m, self.in_features, seed=self.seed + 1, dtype=self.dtype), self.weight()
        return x, weight, random_tensor(self.out_features, seed=self.seed + 2, dtype=self.dtype) if self.bias else None

    def launch_args(self, x: Tensor, weight: BSRWeight, bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of a `KernelSpec.launch` of this op, without a pack."""
        return (
            x,
            weight.values,
            weight.crow_indices,
            weight.col_indices,
            bias,
            [],
            list(weight.weight_shape[:2]),
            list(self.block_shape),
            self.epilogue,
        )

    def expected(self, x: Tensor, weight: BSRWeight, bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The float64 reference and the keyword arguments of `testing.assert_close` for it."""
        scale, terms = testing.scale_bsr_linear(x, weight, bias)
        ref = testing.reference_bsr_linear(x, weight, bias, self.epilogue)
        return ref, {"scale": scale, "terms": terms, "block_shape": self.block_shape}

    def problem(self, device: str = "cpu") -> LinearProblem:
        """The case as the dispatcher sees it."""
        nnz_blocks = self.weight().nnz_blocks
        return LinearProblem(
            self.m, self.in_features, self.out_features, self.block_shape, nnz_blocks, self.dtype, device, self.epilogue
        )


@dataclass(frozen=True)
class LowRankLinearCase:
    """A low-rank linear layer over ``m`` rows."""

    name: str = "low_rank_linear"
    m: int = 5
    in_features: int = 24
    out_features: int = 40
    rank: int = 6
    bias: bool = True
    epilogue: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    op: ClassVar[str] = "low_rank_linear"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(x (m, in), U (out, rank), V (rank, in), bias or None)`` on the CPU."""
        shapes = ((self.m, self.in_features), (self.out_features, self.rank), (self.rank, self.in_features))
        x, U, V = (random_tensor(*s, seed=self.seed + i, dtype=self.dtype) for i, s in enumerate(shapes))
        return x, U, V, random_tensor(self.out_features, seed=self.seed + 3, dtype=self.dtype) if self.bias else None

    def launch_args(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of a `KernelSpec.launch` of this op."""
        return x, U, V, bias, [], self.epilogue

    def expected(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The float64 reference and the keyword arguments of `testing.assert_close` for it."""
        scale, terms = testing.scale_low_rank_linear(x, U, V, bias)
        ref = testing.reference_low_rank_linear(x, U, V, bias, self.epilogue)
        return ref, {"scale": scale, "terms": terms, "u_mul": UNIT_ROUNDOFF[self.dtype]}

    def problem(self, device: str = "cpu") -> LowRankLinearProblem:
        """The case as the dispatcher sees it."""
        return LowRankLinearProblem(
            self.m, self.in_features, self.out_features, self.rank, self.dtype, device, self.epilogue
        )


@dataclass(frozen=True)
class LowRankConvCase:
    """A low-rank convolution of the given kind; ``ranks`` is (K,), or (r_in, r_out) for tucker2."""

    name: str = "low_rank_conv"
    kind: str = "tai"
    n: int = 2
    c_in: int = 6
    h: int = 7
    w: int = 9
    c_out: int = 10
    kernel_size: Pair = (3, 3)
    ranks: tuple[int, ...] = (4,)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    bias: bool = True
    epilogue: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    op: ClassVar[str] = "low_rank_conv2d"

    def factor_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Weight shapes of the factors, in the order in which they are applied."""
        (r, s), first, last = self.kernel_size, self.ranks[0], self.ranks[-1]
        return {
            "tai": ((first, self.c_in, r, 1), (self.c_out, first, 1, s)),
            "svd": ((first, self.c_in, r, s), (self.c_out, first, 1, 1)),
            "tucker2": ((first, self.c_in, 1, 1), (last, first, r, s), (self.c_out, last, 1, 1)),
        }[self.kind]

    def inputs(self) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """``(x channels_last, factors, bias or None)`` on the CPU."""
        x = random_tensor(self.n, self.c_in, self.h, self.w, seed=self.seed, dtype=self.dtype)
        factors = [
            random_tensor(*shape, seed=self.seed + i + 1, dtype=self.dtype)
            for i, shape in enumerate(self.factor_shapes())
        ]
        bias = random_tensor(self.c_out, seed=self.seed + 5, dtype=self.dtype) if self.bias else None
        return x.contiguous(memory_format=torch.channels_last), factors, bias

    def launch_args(self, x: Tensor, factors: list[Tensor], bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of a `KernelSpec.launch` of this op."""
        geometry = list(self.stride), list(self.padding), list(self.dilation)
        return x, factors, bias, [], *geometry, self.kind, self.epilogue

    def expected(self, x: Tensor, factors: list[Tensor], bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The float64 reference and the keyword arguments of `testing.assert_close` for it."""
        args = (x, factors, bias, self.stride, self.padding, self.dilation, self.kind, self.epilogue)
        scale, terms = testing.scale_low_rank_conv2d(*args)
        ref = testing.reference_low_rank_conv2d(*args)
        return ref, {"scale": scale, "terms": terms, "u_mul": UNIT_ROUNDOFF[self.dtype]}

    def problem(self, device: str = "cpu") -> LowRankConvProblem:
        """The case as the dispatcher sees it."""
        return LowRankConvProblem(
            self.n,
            self.h,
            self.w,
            self.kind,
            self.factor_shapes(),
            self.stride,
            self.padding,
            self.dilation,
            self.dtype,
            device,
            self.epilogue,
        )


@dataclass(frozen=True)
class FusedConvCase:
    """A dense convolution with its epilogue; ``contiguous``: x in NCHW order instead of channels_last."""

    name: str = "fused_conv"
    n: int = 2
    c_in: int = 3
    h: int = 9
    w: int = 7
    c_out: int = 16
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    bias: bool = True
    epilogue: str = "none"
    contiguous: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    op: ClassVar[str] = "fused_conv2d"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(x, weight channels_last, bias or None)`` on the CPU."""
        x = random_tensor(self.n, self.c_in, self.h, self.w, seed=self.seed, dtype=self.dtype)
        weight = random_tensor(self.c_out, self.c_in, *self.kernel_size, seed=self.seed + 1, dtype=self.dtype)
        bias = random_tensor(self.c_out, seed=self.seed + 2, dtype=self.dtype) if self.bias else None
        if not self.contiguous:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, weight.contiguous(memory_format=torch.channels_last), bias

    def launch_args(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of a `KernelSpec.launch` of this op."""
        return x, weight, bias, list(self.stride), list(self.padding), list(self.dilation), self.epilogue

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The float64 reference and the keyword arguments of `testing.assert_close` for it."""
        geometry = self.stride, self.padding, self.dilation
        square = None if bias is None else bias.double().square()
        y = testing.conv2d_float64(x, weight.double(), bias, *geometry)
        # A max-pool cannot move a result by more than the largest error in its window.
        scale = testing.conv2d_float64(x.double().square(), weight.double().square(), square, *geometry).sqrt()
        terms = weight[0].numel() + (bias is not None)
        bound = {"scale": testing.apply_epilogue(scale, self.epilogue), "terms": terms}
        return testing.apply_epilogue(y, self.epilogue), bound

    def problem(self, device: str = "cpu") -> FusedConvProblem:
        """The case as the dispatcher sees it."""
        return FusedConvProblem(
            self.n,
            self.c_in,
            self.h,
            self.w,
            self.c_out,
            *self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.dtype,
            device,
            self.epilogue,
        )


Case: TypeAlias = ConvCase | LinearCase | LowRankLinearCase | LowRankConvCase | FusedConvCase


def launch(kernel_name: str, case: Case, inputs: Any, device: str = "cpu", threads: int | None = None) -> Tensor:
    """The output of a listed kernel on ``inputs`` (as `Case.inputs` returns them), with so many torch threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return KERNELS[kernel_name].launch(*to_device(case.launch_args(*inputs), device))
    finally:
        torch.set_num_threads(before)


def assert_matches_reference(
    kernel_name: str, case: Case, device: str = "cpu", threads: int | None = None, **bound: Any
) -> Comparison:
    """Runs a listed kernel on a case and asserts that it computes the float64 reference up to rounding.

    Args:
        kernel_name: key of `slimkernels.kernels.KERNELS`.
        case: sizes and seed.
        device: where the kernel runs; the reference runs on the CPU.
        threads: torch threads of the launch.
        bound: overrides arguments of `testing.compare` (``u_mul=TF32_ROUNDOFF`` where tensor cores round their inputs).

    Raises:
        AssertionError: where `testing.assert_close` does. ValueError: the kernel does not take this case.
    """
    reason = KERNELS[kernel_name].supports(case.problem(device))
    if reason is not None:
        raise ValueError(f"assert_matches_reference: {kernel_name} does not take {case.name}: {reason}")
    inputs = case.inputs()
    out = launch(kernel_name, case, inputs, device, threads)
    ref, arguments = case.expected(*inputs)
    return assert_close(out, ref, **{"name": f"{kernel_name} {case.name}", **arguments, **bound})
