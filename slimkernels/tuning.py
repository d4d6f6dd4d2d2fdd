"""Measuring the tuned table of this machine: kernels, configurations, break-even sparsities, rates.

A `Family` is one layer at one size and block shape; all its sparsities, and the dense layer, are timed in turns. After
every family the table is written, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import timing
from slimkernels.capture import capture
from slimkernels.dispatch import select
from slimkernels.dispatch.cpu_cost import CPU_RATES, CpuRates
from slimkernels.dispatch.select import KernelChoice
from slimkernels.dispatch.tables import Entry, Table
from slimkernels.formats import block_grid
from slimkernels.kernels import KERNELS, KernelSpec
from slimkernels.kernels.problems import (
    PROBLEM_TYPES,
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
)
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, FusedConv2d, LowRankConv2d, LowRankLinear

# (input channels, output channels, kernel, image height and width): layers of VGG-19 on CIFAR-10, VGG-16 on ImageNet,
# and one pointwise layer.
CIFAR_LAYERS = ((64, 64, 3, 32), (128, 128, 3, 16), (256, 256, 3, 8), (512, 512, 3, 4), (512, 512, 3, 2))
IMAGENET_LAYERS = ((128, 128, 3, 112), (256, 256, 3, 56), (512, 512, 3, 28), (512, 512, 3, 14))
POINTWISE_LAYERS = ((256, 256, 1, 14),)
# All distinct convolutions of VGG-19 on CIFAR-10 but the first, with their epilogue: what `tune` begins with on a GPU.
HEADLINE_LAYERS = (
    (64, 64, 32, "relu_maxpool2"),
    (64, 128, 16, "relu"),
    (128, 128, 16, "relu_maxpool2"),
    (128, 256, 8, "relu"),
    (256, 256, 8, "relu"),
    (256, 256, 8, "relu_maxpool2"),
    (256, 512, 4, "relu"),
    (512, 512, 4, "relu"),
    (512, 512, 4, "relu_maxpool2"),
    (512, 512, 2, "relu"),
    (512, 512, 2, "relu_maxpool2"),
)
HEADLINE_BLOCK_SHAPES = ((128, 16), (64, 16))
HEADLINE_BATCH = 1024
LINEAR_LAYERS = ((512, 512), (4096, 4096))
BLOCK_SHAPES = {
    "cpu": ((16, 1), (32, 1), (8, 1), (16, 4), (16, 16), (32, 32)),
    "cuda": ((64, 16), (128, 16), (128, 32), (256, 16), (16, 16), (32, 32), (64, 64)),
}
BATCHES = {"cpu": (1, 16), "cuda": (16, 128, 1024)}
SPARSITIES = {"cpu": (0.5, 0.75, 0.9), "cuda": (0.5, 0.75, 0.875, 0.95)}
# Configurations of one problem that are timed, the fastest by prediction first: each costs a compilation.
_TIMED_CONFIGS = 4
# Of a layer in one CUDA graph.
_CALLS_A_GRAPH = 10


@dataclass(frozen=True)
class Family:
    """Problems that differ in nothing but how many blocks are stored; one problem of a low-rank layer."""

    problems: tuple[SizedProblem, ...]

    @property
    def label(self) -> str:
        """A line for a progress bar."""
        p = self.problems[0]
        block = f" {p.block_shape[0]}x{p.block_shape[1]}" if p.op.startswith("bsr") else ""
        if isinstance(p, ConvProblem):
            pooled = " pooled" if p.epilogue == "relu_maxpool2" else ""
            return f"{p.op} {p.c_in}->{p.c_out} {p.r}x{p.s} @ {p.n}x{p.h}x{p.w}{block}{pooled}"
        if isinstance(p, LinearProblem | LowRankLinearProblem):
            rank = f" rank {p.rank}" if isinstance(p, LowRankLinearProblem) else ""
            return f"{p.op} {p.in_features}->{p.out_features} @ {p.m}{block}{rank}"
        assert isinstance(p, LowRankConvProblem), "families of fused convolutions are not tuned"
        return f"{p.op} {p.kind} {p.factor_shapes[0][1]}->{p.factor_shapes[-1][0]} @ {p.n}x{p.h}x{p.w}"


def standard_families(
    device: str,
    *,
    batches: Sequence[int] | None = None,
    block_shapes: Sequence[tuple[int, int]] | None = None,
    sparsities: Sequence[float] | None = None,
    ops: Sequence[str] | None = None,
) -> list[Family]:
    """The families of `slimkernels tune`: the commonest layers first, every block shape of one layer together.

    On a GPU the convolutions of VGG-19 at 1024 images come before all else, those that are pooled too.

    Args:
        device: ``cpu`` (float32) or ``cuda`` (bfloat16).
        batches: by default those of the device.
        block_shapes: by default those of the device.
        sparsities: by default those of the device.
        ops: by default all four.

    Raises:
        ValueError: a value out of range, or an unknown op.
    """
    batches = tuple(batches or BATCHES[device])
    shapes, shares = tuple(block_shapes or BLOCK_SHAPES[device]), tuple(sparsities or SPARSITIES[device])
    ops = tuple(ops or ("bsr_conv2d", "bsr_linear", "low_rank_linear", "low_rank_conv2d"))
    if min(batches) < 1 or not all(0 <= s < 1 for s in shares) or any(min(b) < 1 for b in shapes):
        raise ValueError(
            f"standard_families: expected batches >= 1, sparsities in [0, 1) and positive block shapes, "
            f"got {batches}, {shares}, {shapes}"
        )
    unknown = [op for op in ops if op not in PROBLEM_TYPES]
    if unknown:
        raise ValueError(f"standard_families: expected ops in {', '.join(PROBLEM_TYPES)}, got {unknown[0]!r}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: list[Family] = []
    if "bsr_conv2d" in ops:
        layers = [(n, layer, "relu") for n in batches for layer in CIFAR_LAYERS + POINTWISE_LAYERS]
        layers += [(1 if device == "cpu" else 32, layer, "relu") for layer in IMAGENET_LAYERS]
        ways = [(*layer, block) for layer in layers for block in shapes]
        if device == "cuda" and HEADLINE_BATCH in batches:
            headline = [
                (HEADLINE_BATCH, (c_in, c_out, 3, size), epilogue, (min(block[0], c_out), block[1]))
                for block in HEADLINE_BLOCK_SHAPES
                if block in shapes
                for c_in, c_out, size, epilogue in HEADLINE_LAYERS
            ]
            ways = list(dict.fromkeys(headline + ways))
        for n, (c_in, c_out, k, size), epilogue, block in ways:
            problem = ConvProblem(
                n, c_in, size, size, c_out, k, k, (1, 1), (k // 2, k // 2), (1, 1), block, 0, dtype, device, epilogue
            )
            found.append(_family(problem, (c_out, c_in, k, k), shares))
    if "bsr_linear" in ops:
        for m in batches:
            for features, out in LINEAR_LAYERS:
                for block in shapes:
                    linear = LinearProblem(m, features, out, block, 0, dtype, device, "relu")
                    found.append(_family(linear, (out, features), shares))
    if "low_rank_linear" in ops:
        for m in batches:
            for features, out in LINEAR_LAYERS:
                for rank in (32, 128):
                    found.append(Family((LowRankLinearProblem(m, features, out, rank, dtype, device, "relu"),)))
    if "low_rank_conv2d" in ops:
        for n in batches:
            for c_in, c_out, k, size in CIFAR_LAYERS[1:4]:
                factors = ((c_out // 4, c_in, k, 1), (c_out, c_out // 4, 1, k))
                found.append(
                    Family(
                        (
                            LowRankConvProblem(
                                n, size, size, "tai", factors, (1, 1), (k // 2, k // 2), (1, 1), dtype, device, "relu"
                            ),
                        )
                    )
                )
    return found


def _family(problem: ConvProblem | LinearProblem, weight_shape: tuple[int, ...], sparsities: Sequence[float]) -> Family:
    rows, columns = block_grid((*weight_shape, 1, 1)[:4], problem.block_shape)
    counts = sorted({max(1, round(rows * columns * (1 - s))) for s in sparsities}, reverse=True)
    return Family(tuple(replace(problem, nnz_blocks=n) for n in counts))


def build(problem: SizedProblem) -> tuple[nn.Module, nn.Module, Tensor]:
    """``(layer, dense layer, input)`` of a problem with seeded random values; the dense one without the epilogue.

    A block-sparse weight has its blocks spread at random over the grid, one at least in every row where they suffice.
    """
    # The pattern is drawn on the CPU, the values where they are needed: a layer of 1024 images has 67 million.
    generator = torch.Generator().manual_seed(0)
    values = torch.Generator(problem.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=values, device=problem.device).to(problem.dtype)

    with torch.no_grad():
        if isinstance(problem, LowRankLinearProblem):
            u, v = randn(problem.out_features, problem.rank), randn(problem.rank, problem.in_features)
            layer: nn.Module = LowRankLinear.from_factors(u, v, randn(problem.out_features), problem.epilogue)
            x = randn(problem.m, problem.in_features)
        elif isinstance(problem, LowRankConvProblem):
            factors = [randn(*shape) for shape in problem.factor_shapes]
            layer = LowRankConv2d.from_factors(
                factors,
                randn(factors[-1].shape[0]),
                kind=problem.kind,
                stride=problem.stride,
                padding=problem.padding,
                dilation=problem.dilation,
                epilogue=problem.epilogue,
            )
            x = randn(problem.n, factors[0].shape[1], problem.h, problem.w)
        elif isinstance(problem, FusedConvProblem):
            taps = (problem.r, problem.s)
            layer = FusedConv2d(
                problem.c_in,
                problem.c_out,
                taps,
                problem.stride,
                problem.padding,
                problem.dilation,
                epilogue=problem.epilogue,
                device=problem.device,
                dtype=problem.dtype,
            )
            for parameter in layer.parameters():
                parameter.copy_(randn(*parameter.shape))
            x = randn(problem.n, problem.c_in, problem.h, problem.w)
        else:
            return _block_sparse(problem, randn, generator)
    layer = layer.eval().requires_grad_(False)
    to_dense: Any = layer.to_dense
    dense = to_dense().eval().requires_grad_(False)
    return layer, _channels_last(dense), _channels_last(x)


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() != 4:
        return value
    return (
        value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, Tensor)
        else value.to(memory_format=torch.channels_last)
    )


def _block_sparse(
    problem: ConvProblem | LinearProblem, randn: Callable[..., Tensor], generator: torch.Generator
) -> tuple[nn.Module, nn.Module, Tensor]:
    options: dict[str, Any] = {"device": problem.device, "dtype": problem.dtype}
    if isinstance(problem, ConvProblem):
        dense: Any = nn.Conv2d(
            problem.c_in,
            problem.c_out,
            (problem.r, problem.s),
            problem.stride,
            problem.padding,
            problem.dilation,
            **options,
        )
        x = randn(problem.n, problem.c_in, problem.h, problem.w)
    else:
        dense = nn.Linear(problem.in_features, problem.out_features, **options)
        x = randn(problem.m, problem.in_features)
    dense = dense.eval().requires_grad_(False)
    dense.weight.copy_(randn(*dense.weight.shape))
    rows, columns = block_grid((*dense.weight.shape, 1, 1)[:4], problem.block_shape)
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    order = torch.randperm(rows * columns, generator=generator)
    firsts = torch.arange(rows) * columns + torch.randint(columns, (rows,), generator=generator)
    chosen = torch.cat([firsts, order[~torch.isin(order, firsts)]])[: problem.nnz_blocks]
    mask[chosen] = True
    cls: Any = BlockSparseConv2d if isinstance(problem, ConvProblem) else BlockSparseLinear
    layer = cls.from_dense(dense, problem.block_shape, mask.reshape(rows, columns), problem.epilogue)
    layer = layer.eval().requires_grad_(False)
    return layer, _channels_last(layer.to_dense().requires_grad_(False)), _channels_last(x)


def _dense_call(dense: nn.Module, x: Tensor, epilogue: str) -> Callable[[], Tensor]:
    if epilogue == "none":
        return lambda: dense(x)
    if epilogue == "relu":
        return lambda: F.relu_(dense(x))
    return lambda: F.max_pool2d(F.relu_(dense(x)), 2)


def _forced_call(layer: nn.Module, x: Tensor, choice: KernelChoice) -> Callable[[], Tensor]:
    """A call of a layer whose op runs ``choice``. A CPU module's prepared call is the choice itself."""

    def call() -> Tensor:
        with select.forced(choice):
            return layer(x)

    return call


def captured(call: Callable[[], Any], device: str, calls: int = 1) -> Callable[[], Any]:
    """On CUDA, a call captured in a CUDA graph: what is compared then is kernels, not Python. Elsewhere the call.

    The replay keeps the call, since the graph reads its tensors. Once they were freed, the next capture would give
    their memory back, and the graph end in an illegal memory access (a step of a copied model did so on an H200).

    Args:
        calls: how often the graph holds it, one after the other. Replaying a graph takes the CPU some 5 us, more than
            the smallest kernels take the GPU.
    """
    if device != "cuda":
        return call
    graph, result = capture(call, calls=calls)

    def replay(kept: Any = (call, result)) -> None:
        graph.replay()

    return replay


def _ways(problem: SizedProblem) -> list[tuple[KernelSpec, dict[str, int]]]:
    """Kernels and configurations to time: of every kernel the likeliest few."""
    by_kernel: dict[str, list[tuple[float, int, KernelSpec, dict[str, int]]]] = {}
    for i, (spec, config) in enumerate(select.configurations(problem)):
        predicted = select.predicted_seconds(spec, problem, config)
        by_kernel.setdefault(spec.name, []).append((predicted, i, spec, config))
    return [way[2:] for ways in by_kernel.values() for way in sorted(ways, key=lambda w: w[:2])[:_TIMED_CONFIGS]]


def measure_family(family: Family, seconds: float = 0.05) -> list[Entry]:
    """The entries of a family: every problem's kernels and configurations, and the dense layer, timed in turns.

    Args:
        seconds: time budget per callable.

    Raises:
        ValueError: no kernel takes a problem.
    """
    calls: dict[str, Callable[[], Any]] = {}
    ways: dict[str, tuple[SizedProblem, KernelChoice]] = {}
    with torch.inference_mode():
        for i, problem in enumerate(family.problems):
            layer, dense, x = build(problem)
            if i == 0:
                call = _dense_call(dense, x, problem.epilogue)
                calls["dense"] = captured(call, problem.device, _CALLS_A_GRAPH)
            for spec, config in _ways(problem):
                key = f"{i} {spec.name} {sorted(config.items())}"
                choice = KernelChoice(spec.name, config)
                own = _with_kernel(layer, spec)
                calls[key] = captured(_forced_call(own, x, choice), problem.device, _CALLS_A_GRAPH)
                ways[key] = problem, choice
    times = timing.interleaved(calls, seconds=seconds, min_rounds=3)
    # Another process on the machine only ever adds time, so the faster fifth stands for a call.
    each = _CALLS_A_GRAPH if family.problems[0].device == "cuda" else 1
    dense_s = times["dense"].p20 / each
    entries = []
    for problem in family.problems:
        timed = [(times[key].p20 / each, choice) for key, (p, choice) in ways.items() if p == problem]
        best, choice = min(timed, key=lambda pair: pair[0])
        entries.append(Entry(problem, choice.name, dict(choice.config), best, dense_s, len(timed)))
    return entries


def _with_kernel(layer: nn.Module, spec: KernelSpec) -> nn.Module:
    """A copy of the layer that asks for a kernel by name: on the CPU the pack follows the kernel."""
    import copy

    own: Any = copy.deepcopy(layer)
    own.kernel = spec.name
    own.train()
    return own.eval()


def tune(
    table: Table,
    families: Iterable[Family],
    *,
    seconds: float = 0.05,
    redo: bool = False,
    done: Callable[[Family, list[Entry]], None] = lambda family, entries: None,
) -> Iterator[tuple[Family, list[Entry] | str]]:
    """Measures families into a table, yielding each with its entries, or with why no kernel takes it.

    A family whose problems the table holds is left alone and yields those entries. ``done`` is called after every
    measured family: for saving the table.

    Args:
        redo: measure what the table holds, too.
    """
    for family in families:
        known = [table.entry(p) for p in family.problems]
        if not redo and all(known):
            yield family, [e for e in known if e is not None]
            continue
        try:
            entries = measure_family(family, seconds)
        except ValueError as error:
            yield family, str(error)
            continue
        for entry in entries:
            table.put(entry)
        fitted = fit_cpu_rates(table.entries, select.machine_isa(), torch.get_num_threads())
        table.rates = fitted or table.rates
        done(family, entries)
        yield family, entries


def fit_cpu_rates(entries: Sequence[Entry], isa: str, threads: int) -> CpuRates | None:
    """Rates of a CPU from its block-sparse entries, by least squares of the relative error.

    ``seconds = call + 2 multiply-adds / (rate * threads)``, of the dense layers ``+ weight bytes / bandwidth``. None
    with fewer than four entries of a kernel of this instruction set.

    Args:
        isa: of the sparse kernels.
        threads: torch threads of the measurement.
    """
    own = [
        e
        for e in entries
        if e.problem.device == "cpu" and e.problem.op.startswith("bsr") and KERNELS[e.kernel].isa == isa
    ]
    if len(own) < 4:
        return None
    rates = CPU_RATES[isa]
    sparse = _fit([((1.0, 2.0 * e.problem.macs), e.seconds) for e in own if e.problem.block_shape[0] % 16 == 0])
    narrow = _fit([((1.0, 2.0 * e.problem.macs), e.seconds) for e in own if e.problem.block_shape[0] % 16])
    work = {(e.problem.dense_work(), e.dense_seconds) for e in own}
    dense = _fit([((1.0, 2.0 * macs, float(nbytes)), seconds) for (macs, nbytes), seconds in sorted(work)])
    call, flop = sparse if sparse else (rates.sparse_call_s, 1 / rates.sparse_flops / threads)
    flop8 = narrow[1] if narrow else flop * rates.sparse_flops / rates.sparse_flops_strip8
    dense_call, dense_flop, dense_byte = dense or (
        rates.dense_call_s,
        1 / rates.dense_flops / threads,
        1 / rates.dense_bytes_s,
    )
    return CpuRates(
        isa,
        1 / dense_flop / threads,
        dense_call,
        1 / max(dense_byte, 1e-15),
        1 / flop / threads,
        1 / flop8 / threads,
        call,
    )


def _fit(points: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, ...] | None:
    """Non-negative costs of (amounts, seconds) with ``sum(costs * amounts) = seconds``, the second positive.

    Rows are divided by their times: relative errors count, so the shortest calls show the fixed cost. None where the
    second amount takes fewer than two values.
    """
    if len({amounts[1] for amounts, _ in points}) < 2:
        return None
    rows = torch.tensor([amounts for amounts, _ in points], dtype=torch.float64)
    rows = rows / torch.tensor([seconds for _, seconds in points], dtype=torch.float64)[:, None]
    units, ones = rows.square().mean(dim=0).sqrt(), torch.ones(len(points), dtype=torch.float64)
    rows = rows / units
    others = [i for i in range(rows.shape[1]) if i != 1]
    best: tuple[float, ...] | None = None
    least = float("inf")
    for left_out in [set(c) for n in range(len(others) + 1) for c in itertools.combinations(others, n)]:
        columns = [i for i in range(rows.shape[1]) if i not in left_out]
        costs = torch.linalg.lstsq(rows[:, columns], ones[:, None]).solution.flatten()
        residual = float((rows[:, columns] @ costs - ones).square().sum())
        if residual < least and bool((costs >= 0).all()) and float(costs[columns.index(1)]) > 0:
            found = dict(zip(columns, (costs / units[columns]).tolist(), strict=True))
            best, least = tuple(found.get(i, 0.0) for i in range(rows.shape[1])), residual
    return best
