"""The ways to run one unit (a layer or a chain of thin layers, with the ReLU and pool behind it), and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimkernels.conversion.analysis import (
    PatternStats,
    fused_problems,
    problems,
    rank_patterns,
    usable_kernel,
    zero_share,
)
from slimkernels.conversion.calls import Call
from slimkernels.conversion.factor_chains import FactorChain
from slimkernels.conversion.folding import Tail
from slimkernels.conversion.layers import LayerWeight
from slimkernels.conversion.plan import Policy
from slimkernels.dispatch.select import choose
from slimkernels.formats import block_mask
from slimkernels.kernels import KERNELS, cuda_tensor_cores
from slimkernels.kernels.problems import (
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
)
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, FusedConv2d, LowRankConv2d, LowRankLinear


@dataclass
class Unit:
    """What one decision is about.

    Attributes:
        names: the layers, one or a chain.
        weight: the dense layer, batch norm folded; of a chain, the merged one.
        chain: the factors, of a chain of layers or of one low-rank module.
        dense: the layers as they stay without a swap, batch norm folded.
        tail: what follows.
        calls: per example input, the calls of the first layer.
        source: ``layer``, or the drop-in module that the unit is already: ``bsr``, ``low_rank``.
        mask: declared blocks, which are stored while training although they may be zero.
    """

    names: tuple[str, ...]
    weight: LayerWeight
    chain: FactorChain | None
    dense: list[nn.Module]
    tail: Tail
    calls: tuple[tuple[Call, ...], ...]
    source: str = "layer"
    training: bool = False
    mask: Tensor | None = None


@dataclass
class Option:
    """One way to run a unit: ``format`` None leaves the layers as they are."""

    format: str | None
    modules: list[nn.Module]
    epilogue: str = "none"
    kernel: str | None = None
    pattern: PatternStats | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Candidates:
    """The ways to run a unit that are compared.

    Attributes:
        stay: what the others have to beat, and what is taken where none does.
        options: the others, the best predicted first.
        fused: the dense convolution with what follows it in one kernel; tried beside the options.
        why: what is missing among the options, and the reason.
        settled: the one way there is, where nothing is to be compared.
    """

    stay: Option
    options: list[Option]
    fused: list[Option] = field(default_factory=list)
    why: str = ""
    settled: Option | None = None


def candidates(unit: Unit, policy: Policy, sizes: Sequence[Sequence[int]] | None) -> Candidates:
    """The ways to run a unit, by what it is made from.

    Args:
        sizes: shapes of the inputs of its first layer; None where they are not known.
    """
    if unit.source == "low_rank":
        return _of_low_rank_module(unit, policy)
    if unit.chain is not None:
        return _of_thin_layers(unit, policy)
    return _of_dense_weight(unit, policy, sizes)


def unchanged(unit: Unit) -> Option:
    """The unit without a swap. A block-sparse module then becomes the dense layer that it stands for."""
    form = {"layer": None, "bsr": "dense", "low_rank": "low_rank"}[unit.source]
    return Option(form, [*unit.dense, *rest(unit, "none")])


def _of_dense_weight(unit: Unit, policy: Policy, sizes: Sequence[Sequence[int]] | None) -> Candidates:
    """Of a dense layer, or of stored blocks: block-sparse, or dense with what follows it in its kernel."""
    options, why = block_sparse_options(unit, policy, sizes)
    return Candidates(unchanged(unit), options, fused_options(unit, policy, sizes), why)


def _of_thin_layers(unit: Unit, policy: Policy) -> Candidates:
    """Of a chain of layers that some factorization left: one low-rank module, or merged to the dense layer."""
    options, why = low_rank_options(unit, policy)
    merged = merged_option(unit, policy)
    options += [merged] if merged is not None else []
    return Candidates(unchanged(unit), options, why="" if options else why)


def _of_low_rank_module(unit: Unit, policy: Policy) -> Candidates:
    """Of a low-rank module: by a kernel of ours or by torch's layers, compared with the dense layer it stands for."""
    (options, why), stay = low_rank_options(unit, policy), unchanged(unit)
    merged = merged_option(unit, policy)
    if not options:
        return Candidates(stay, [], why=why or "stays low-rank", settled=stay)
    if merged is not None:
        return Candidates(merged, options)
    if len(options) == 1:
        return Candidates(stay, [], why="stays low-rank", settled=options[0])
    *kernels, torch_layers = options
    return Candidates(torch_layers, kernels)


def _epilogues(unit: Unit, policy: Policy) -> list[str]:
    """Epilogues to try, the one that takes in most first."""
    names = ["none"]
    if unit.tail.relu is not None and policy.fuse_relu:
        names.insert(0, "relu")
        if unit.tail.pool is not None and policy.fuse_pool and unit.weight.is_conv:
            names.insert(0, "relu_maxpool2")
    return names


def rest(unit: Unit, epilogue: str) -> list[nn.Module]:
    """ReLU and pool of the unit's tail that the epilogue leaves to run on their own."""
    rest: list[nn.Module] = []
    if unit.tail.relu is not None and epilogue == "none":
        rest.append(nn.ReLU(inplace=True))
    if unit.tail.pool is not None and epilogue != "relu_maxpool2":
        rest.append(nn.MaxPool2d(2))
    return rest


def block_sparse_options(unit: Unit, policy: Policy, sizes: Sequence[Sequence[int]] | None) -> tuple[list[Option], str]:
    """The best candidate block shapes as modules, and why there is none."""
    weight, shapes = unit.weight, policy.block_shapes
    ranked = rank_patterns(weight, sizes, block_shapes=shapes, backend=policy.backend)
    usable = [p for p in ranked if p.kernel is not None]
    if not usable:
        return [], ranked[0].reason
    sparse = any(p.nnz_blocks < p.blocks for p in usable)
    if not sparse and not (policy.dense_layers and ((policy.measure and sizes is not None) or policy.min_speedup == 0)):
        share = zero_share(weight.weight)
        return [], f"no zero blocks ({share:.1%} of its weights are 0)" if share else "no zeros"
    options = []
    for i, pattern in enumerate(_distinct(usable)[: policy.measured_candidates]):
        epilogues = _epilogues(unit, policy)
        taken = 0
        for epilogue in epilogues:
            problem = problems(weight, (pattern.block_shape, pattern.nnz_blocks), sizes, epilogue)[0]
            kernel, _ = usable_kernel(problem, policy.backend)
            if kernel is None:
                continue
            asked = "auto" if policy.backend == "auto" else kernel
            options.append(_block_sparse_option(unit, pattern, epilogue, kernel, asked))
            options += [_block_sparse_option(unit, pattern, epilogue, n, n) for n in _by_name(unit, policy, problem)]
            taken += 1
            # A pool inside the kernel is not always the faster one, so the best pattern is also tried without it.
            if not (epilogue == "relu_maxpool2" and i == 0 and policy.measure and sizes is not None) or taken == 2:
                break
    return options, ""


# Kernels that are ahead of `auto`'s on some layers and behind on others, so that only a measurement can choose them.
MEASURED = (cuda_tensor_cores.NAME,)


def _by_name(unit: Unit, policy: Policy, problem: ConvProblem | LinearProblem) -> list[str]:
    """Kernels that `auto` never takes, of a layer on a GPU that is timed as it will be served, in a CUDA graph."""
    if not times_graphs(unit, policy) or policy.backend != "auto" or not unit.calls:
        return []
    specs = [KERNELS[name] for name in MEASURED]
    return [s.name for s in specs if s.supports(problem) is None and s.available() is None]


def times_graphs(unit: Unit, policy: Policy) -> bool:
    """Whether the unit's options are timed in CUDA graphs: on a GPU, where the model will be served as a recording."""
    return policy.measure and policy.serve is not None and not unit.training and unit.weight.weight.is_cuda


def _distinct(ranked: list[PatternStats]) -> list[PatternStats]:
    """Candidates that may beat those ranked before them: each stores fewer weights than all of these."""
    taken: list[PatternStats] = []
    for pattern in ranked:
        stored = pattern.nnz_blocks * math.prod(pattern.block_shape)
        if all(stored < p.nnz_blocks * math.prod(p.block_shape) for p in taken):
            taken.append(pattern)
    return taken


def _block_sparse_option(unit: Unit, pattern: PatternStats, epilogue: str, kernel: str, asked: str) -> Option:
    """Of stored blocks, on a kernel that the module asks for as ``auto`` or by its name."""
    dense = unit.weight.to_module().train(unit.training)
    mask = None
    if unit.training and unit.mask is not None:
        mask = unit.mask | block_mask(unit.weight.weight, pattern.block_shape)
    cls = BlockSparseConv2d if unit.weight.is_conv else BlockSparseLinear
    # For mypy: the class fits the layer that was read.
    module = cls.from_dense(dense, pattern.block_shape, mask, epilogue, asked)  # type: ignore[arg-type]
    return Option("bsr", [module, *rest(unit, epilogue)], epilogue, kernel, pattern)


def fused_options(unit: Unit, policy: Policy, sizes: Sequence[Sequence[int]] | None) -> list[Option]:
    """The dense convolution with what follows it in one kernel, with as much of that as a kernel takes.

    Empty where this device has no kernel for it but torch's own layers, and while training.
    """
    found: list[Option] = []
    if unit.training or not unit.weight.is_conv:
        return found
    for epilogue in _epilogues(unit, policy):
        try:
            kernel = choose(fused_problems(unit.weight, sizes, epilogue)[0], policy.backend).name
        except ValueError:
            continue
        if KERNELS[kernel].backend == "reference":
            continue
        asked = "auto" if policy.backend == "auto" else kernel
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        module = FusedConv2d.from_dense(dense_twin(unit.weight), epilogue, asked)  # type: ignore[arg-type]
        found.append(Option("fused", [module.eval(), *rest(unit, epilogue)], epilogue, kernel))
        # As with blocks, a pool of its own may be the faster one.
        if epilogue != "relu_maxpool2" or not policy.measure or sizes is None:
            break
    return found[:2]


def low_rank_options(unit: Unit, policy: Policy) -> tuple[list[Option], str]:
    """A chain as one low-rank module, and why there is none.

    A low-rank module is also tried on torch's layers, factor by factor, which come last; a chain of layers is that
    already.
    """
    chain = unit.chain
    assert chain is not None
    epilogue = "relu" if "relu" in _epilogues(unit, policy) else "none"
    options: list[Option] = []
    reason = ""
    try:
        problem = low_rank_problem(unit, epilogue)
        chosen = choose(problem, policy.backend).name
    except ValueError as error:
        reason = str(error)
    else:
        reference = f"{problem.op}__reference"
        asked = ["auto" if policy.backend == "auto" else chosen]
        if unit.source == "low_rank" and policy.backend == "auto" and policy.measure and unit.calls:
            asked.append(reference)
        for kernel in asked:
            module = low_rank_module(chain, epilogue, kernel).train(unit.training)
            runs = chosen if kernel == "auto" else kernel
            if KERNELS[runs].isa is not None and kernel == "auto" and not module.prepacked:
                runs = reference
            if all(option.kernel != runs for option in options):
                options.append(Option("low_rank", [module, *rest(unit, epilogue)], epilogue, runs))
    return options, reason


def merged_option(unit: Unit, policy: Policy) -> Option | None:
    """A chain merged to the dense layer that it stands for.

    None while training, and where the policy keeps the rank, and with it the size on disk.
    """
    if unit.training or not policy.merge_low_rank:
        return None
    return Option("dense", [dense_twin(unit.weight), *rest(unit, "none")])


def low_rank_module(chain: FactorChain, epilogue: str, kernel: str) -> LowRankConv2d | LowRankLinear:
    """A chain as one module."""
    if chain.factors[0].dim() == 2:
        v, u = chain.factors
        module: LowRankConv2d | LowRankLinear = LowRankLinear.from_factors(u, v, chain.bias, epilogue, kernel)
    else:
        module = LowRankConv2d.from_factors(
            chain.factors,
            chain.bias,
            kind=chain.kind,
            stride=chain.stride,
            padding=chain.padding,
            dilation=chain.dilation,
            epilogue=epilogue,
            kernel=kernel,
        )
    return module.requires_grad_(chain.requires_grad)


def low_rank_problem(unit: Unit, epilogue: str, call: Call | None = None) -> SizedProblem:
    """The problem of a chain at a call, by default its first one, or at one small image or row."""
    chain = unit.chain
    assert chain is not None
    first = chain.factors[0]
    call = call or next((c for calls in unit.calls for c in calls), None)
    shape = None if call is None else call.input_shape
    dtype, device = first.dtype, first.device.type
    if first.dim() == 2:
        rows = 1 if shape is None else math.prod(shape[:-1])
        out = chain.factors[1].shape[0]
        return LowRankLinearProblem(rows, first.shape[1], out, first.shape[0], dtype, device, epilogue)
    n, h, w = (1, 32, 32) if shape is None else (math.prod(shape[:-3]), shape[-2], shape[-1])
    shapes = tuple(tuple(f.shape) for f in chain.factors)
    return LowRankConvProblem(
        n,
        h,
        w,
        chain.kind,
        shapes,  # type: ignore[arg-type]  # taken from a module's attribute, which mypy takes for a Tensor or a Module
        chain.stride,
        chain.padding,
        chain.dilation,
        dtype,
        device,
        # For mypy: taken from a module's attribute, which mypy takes for a Tensor or a Module.
        epilogue,  # type: ignore[arg-type]
    )


def dense_twin(weight: LayerWeight) -> nn.Module:
    """The dense layer as it would run at its best: weight in channels_last."""
    if weight.is_conv:
        weight = LayerWeight(
            weight.weight.contiguous(memory_format=torch.channels_last),
            weight.bias,
            weight.stride,
            weight.padding,
            weight.dilation,
            None,
            weight.requires_grad,
        )
    return weight.to_module().eval()
