"""The ways to run one unit (a layer or a chain of thin layers, with the ReLU and pool behind it), and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slimkernels.conversion import measure
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
from slimkernels.conversion.graph import in_a_line
from slimkernels.conversion.layers import LayerWeight
from slimkernels.conversion.plan import Policy, faster_everywhere
from slimkernels.dispatch.select import choose, predicted_dense_seconds, predicted_seconds
from slimkernels.formats import block_mask
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import LowRankConvProblem, LowRankLinearProblem, SizedProblem
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
class Decision:
    """The option taken, how the unit would stay dense, why, and the times of dense and of the best other option.

    ``failure`` says which candidates raised an error, and what; the decision was made without them.
    """

    option: Option
    stay: Option
    reason: str
    dense_ms: tuple[float, ...] = ()
    other_ms: tuple[float, ...] = ()
    failure: str = ""


def _epilogues(unit: Unit, policy: Policy) -> list[str]:
    """Epilogues to try, the one that takes in most first."""
    names = ["none"]
    if unit.tail.relu is not None and policy.fuse_relu:
        names.insert(0, "relu")
        if unit.tail.pool is not None and policy.fuse_pool and unit.weight.is_conv:
            names.insert(0, "relu_maxpool2")
    return names


def _rest(unit: Unit, epilogue: str) -> list[nn.Module]:
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
            options.append(_block_sparse_option(unit, policy, pattern, epilogue, kernel))
            taken += 1
            # A pool inside the kernel is not always the faster one, so the best pattern is also tried without it.
            if not (epilogue == "relu_maxpool2" and i == 0 and policy.measure and sizes is not None) or taken == 2:
                break
    return options, ""


def _distinct(ranked: list[PatternStats]) -> list[PatternStats]:
    """Candidates that may beat those ranked before them: each stores fewer weights than all of these."""
    taken: list[PatternStats] = []
    for pattern in ranked:
        stored = pattern.nnz_blocks * math.prod(pattern.block_shape)
        if all(stored < p.nnz_blocks * math.prod(p.block_shape) for p in taken):
            taken.append(pattern)
    return taken


def _block_sparse_option(unit: Unit, policy: Policy, pattern: PatternStats, epilogue: str, kernel: str) -> Option:
    dense = unit.weight.to_module().train(unit.training)
    mask = None
    if unit.training and unit.mask is not None:
        mask = unit.mask | block_mask(unit.weight.weight, pattern.block_shape)
    cls = BlockSparseConv2d if unit.weight.is_conv else BlockSparseLinear
    asked = "auto" if policy.backend == "auto" else kernel
    module = cls.from_dense(dense, pattern.block_shape, mask, epilogue, asked)  # type: ignore[arg-type]
    return Option("bsr", [module, *_rest(unit, epilogue)], epilogue, kernel, pattern)


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
        module = FusedConv2d.from_dense(dense_twin(unit.weight), epilogue, asked)  # type: ignore[arg-type]
        found.append(Option("fused", [module.eval(), *_rest(unit, epilogue)], epilogue, kernel))
        # As with blocks, a pool of its own may be the faster one.
        if epilogue != "relu_maxpool2" or not policy.measure or sizes is None:
            break
    return found[:2]


def low_rank_options(unit: Unit, policy: Policy) -> tuple[list[Option], Option | None, str]:
    """``(as one low-rank module, merged to dense, why there is no low-rank option)``.

    A low-rank module is also tried on torch's layers, factor by factor; a chain of layers is that already. Merged is
    None while training and where the policy keeps the rank, and with it the size on disk.
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
                options.append(Option("low_rank", [module, *_rest(unit, epilogue)], epilogue, runs))
    merged = None
    if policy.merge_low_rank and not unit.training:
        merged = Option("dense", [dense_twin(unit.weight), *_rest(unit, "none")])
    return options, merged, reason


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
        shapes,  # type: ignore[arg-type]
        chain.stride,
        chain.padding,
        chain.dilation,
        dtype,
        device,
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


def decide(unit: Unit, policy: Policy) -> Decision:
    """The fastest way to run a unit that is faster than dense at every example input.

    A candidate that raises an error, out of memory included, drops out; where none can be built or measured at all, the
    unit stays as it is. `Decision.failure` says so.
    """
    stay = Option(
        {"layer": None, "bsr": "dense", "low_rank": "low_rank"}[unit.source], [*unit.dense, *_rest(unit, "none")]
    )
    try:
        return _decide(unit, stay, policy)
    except Exception as error:  # one layer's trouble does not end the conversion of all others
        text = f"its candidates could not be built or measured: {in_a_line(error)}"
        return Decision(stay, stay, text, failure=text)


def _decide(unit: Unit, stay: Option, policy: Policy) -> Decision:
    sizes = [call.input_shape for calls in unit.calls for call in calls] if unit.calls else None
    if unit.calls and not sizes:
        return Decision(stay, stay, "the example inputs do not reach it, or with an empty batch only")
    if unit.chain is not None:
        options, merged, why = low_rank_options(unit, policy)
        if unit.source != "low_rank":
            options += [merged] if merged is not None else []
        elif merged is not None and options:
            stay = merged  # compared with the dense layer that it stands for
        elif len(options) < 2:
            return Decision(options[0] if options else stay, stay, why or "stays low-rank")
        else:
            stay = options.pop()
    else:
        options, why = block_sparse_options(unit, policy, sizes)
        fused = fused_options(unit, policy, sizes)
        if policy.measure and sizes:
            options += fused
        elif fused:
            return _fused_by_cost_model(unit, stay, options, fused[0], policy, sizes, why)
    if not options:
        return Decision(stay, stay, why)
    if policy.measure and sizes:
        decision = _by_measurement(unit, stay, options, policy)
        return replace(decision, reason=f"{why}; {decision.reason}") if why and unit.chain is None else decision
    return _by_cost_model(unit, stay, options, policy, sizes is None)


def _fused_by_cost_model(
    unit: Unit,
    stay: Option,
    sparse: list[Option],
    fused: Option,
    policy: Policy,
    sizes: Sequence[Sequence[int]] | None,
    why: str,
) -> Decision:
    """Block-sparse where that is predicted to be faster than dense, else dense with its epilogue where that is."""
    decision = Decision(stay, stay, why)
    if sparse:
        decision = _by_cost_model(unit, stay, sparse, policy, sizes is None)
    asked = fused_problems(unit.weight, sizes, fused.epilogue)
    assert fused.kernel is not None
    dense = [predicted_seconds(KERNELS["fused_conv2d__reference"], p) for p in asked]
    other = [predicted_seconds(KERNELS[fused.kernel], p) for p in asked]
    if decision.option is not stay or not faster_everywhere(dense, other, policy.min_speedup):
        return decision
    how = "decided without shapes" if sizes is None else "by the cost model"
    ratio = min(d / max(o, 1e-12) for d, o in zip(dense, other, strict=True))
    text = f"{decision.reason}; {how}: dense, predicted {ratio:.2f}x or more faster with what follows in its kernel"
    return Decision(fused, stay, text)


def _by_measurement(unit: Unit, stay: Option, options: list[Option], policy: Policy) -> Decision:
    options, failures = list(options), []
    for calls in unit.calls:
        inputs = [measure.example_input(call, unit.weight.weight) for call in calls]
        if not inputs:
            continue
        failures += _time(unit, stay, options, inputs, policy)
    failure = "; ".join(failures)
    if not options:
        return Decision(stay, stay, failure, failure=failure)
    decision = _fastest(unit, stay, options, policy)
    return replace(decision, reason=f"{decision.reason}; {failure}", failure=failure) if failure else decision


def _time(unit: Unit, stay: Option, options: list[Option], inputs: list[Tensor], policy: Policy) -> list[str]:
    """Appends the seconds of one example input to every option; those that fail leave the list, and why is returned.

    Raises:
        Whatever the layers as they are raise: without their time there is nothing to compare with.
    """
    device, failures = unit.weight.weight.device.type, []
    while options:
        every = [stay, *options]
        runs = [measure.LayerRun(nn.Sequential(*option.modules), inputs, unit.training) for option in every]
        try:
            found = measure.typical_seconds(runs, device=device, repeats=policy.repeats, budget_s=policy.budget_s)
        except measure.RunError as error:
            at, cause = runs.index(error.run), error.__cause__
            assert cause is not None
            if at == 0:
                raise cause from None
            failures.append(f"{_label(options.pop(at - 1))} failed: {in_a_line(cause)}")
            continue
        for option, seconds in zip(every, found, strict=True):
            option.seconds.append(seconds)
        break
    return failures


def _label(option: Option) -> str:
    if option.pattern is not None:
        return f"the candidate of {option.pattern.block_shape} blocks"
    words = {"dense": "the merged dense layer", "fused": "the dense layer with its epilogue"}
    return words.get(option.format or "", "the low-rank layer")


def _fastest(unit: Unit, stay: Option, options: list[Option], policy: Policy) -> Decision:
    """The decision between options that all have been timed."""

    def share(option: Option) -> float:
        return sum(o / d for o, d in zip(option.seconds, stay.seconds, strict=True))

    best = min(options, key=share)
    # A low-rank module is smaller than the dense layer it is compared with, so it stays where both are equally fast.
    needed = min(policy.min_speedup, 1.0) if unit.source == "low_rank" else policy.min_speedup
    passing = [o for o in options if faster_everywhere(stay.seconds, o.seconds, needed)]
    dense_ms = tuple(1e3 * s for s in stay.seconds)
    if passing:
        taken = min(passing, key=share)
        text = f"measured {1 / max(share(taken) / len(stay.seconds), 1e-12):.2f}x the speed of {_baseline(unit, stay)}"
        if taken.pattern is not None and taken.pattern.nnz_blocks == taken.pattern.blocks:
            text += ", with every block stored"
        if taken.format == "fused":
            text += f" as it is, {taken.kernel} taking in what follows"
        return Decision(taken, stay, text, dense_ms, tuple(1e3 * s for s in taken.seconds))
    worst = max(range(len(stay.seconds)), key=lambda i: best.seconds[i] / stay.seconds[i])
    text = (
        f"{_baseline(unit, stay)} is as fast or faster: {1e3 * stay.seconds[worst]:.3g} ms against "
        f"{1e3 * best.seconds[worst]:.3g} ms"
    )
    return Decision(stay, stay, text, dense_ms, tuple(1e3 * s for s in best.seconds))


def _baseline(unit: Unit, stay: Option) -> str:
    if unit.chain is None:
        return "dense"
    if unit.source == "low_rank":
        return "torch's layers, factor by factor" if stay.format == "low_rank" else "the merged dense layer"
    return "the chain of layers"


def _by_cost_model(unit: Unit, stay: Option, options: list[Option], policy: Policy, shapeless: bool) -> Decision:
    how = "decided without shapes" if shapeless else "by the cost model"
    best = options[0]
    if best.pattern is None:
        return _low_rank_by_cost_model(unit, stay, options, policy, how if shapeless else None)
    dense, sparse = best.pattern.dense_s, best.pattern.predicted_s
    ratios = [d / max(s, 1e-12) for d, s in zip(dense, sparse, strict=True)]
    sparsity = f"{best.pattern.block_sparsity:.1%} of its {best.pattern.block_shape} blocks are zero"
    if faster_everywhere(dense, sparse, policy.min_speedup):
        return Decision(best, stay, f"{how}: predicted {min(ratios):.2f}x or more faster at every size; {sparsity}")
    return Decision(stay, stay, f"{how}: predicted {min(ratios):.2f}x at the least favourable size; {sparsity}")


def _low_rank_by_cost_model(
    unit: Unit, stay: Option, options: list[Option], policy: Policy, shapeless: str | None
) -> Decision:
    """A chain or low-rank module by predicted times, stay's at first; without shapes nothing but its rank is known."""
    if shapeless is not None:
        if unit.source == "low_rank":
            taken = options[0] if options[0].format == "low_rank" else stay
            return Decision(taken, stay, f"stays low-rank, {shapeless}")
        swap = policy.min_speedup == 0
        text = f"{shapeless}: a chain is fused or merged only where that is faster at known shapes"
        return Decision(options[0] if swap else stay, stay, text)
    calls = [call for calls in unit.calls for call in calls]

    def seconds(option: Option) -> list[float]:
        found = []
        for call in calls:
            problem = low_rank_problem(unit, option.epilogue, call)
            reference = KERNELS[f"{problem.op}__reference"]
            spec = reference if option.kernel is None else KERNELS[option.kernel]
            dense = option.format == "dense"
            found.append(predicted_dense_seconds(problem) if dense else predicted_seconds(spec, problem))
        return found

    before, times = seconds(stay), [seconds(option) for option in options]
    best = min(range(len(options)), key=lambda i: sum(times[i]))
    ratio = min(b / max(t, 1e-12) for b, t in zip(before, times[best], strict=True))
    needed = min(policy.min_speedup, 1.0) if unit.source == "low_rank" else policy.min_speedup
    taken = options[best] if faster_everywhere(before, times[best], needed) else stay
    text = (
        f"by the cost model: predicted {ratio:.2f}x the speed of {_baseline(unit, stay)} at the least favourable size"
    )
    return Decision(taken, stay, text)
