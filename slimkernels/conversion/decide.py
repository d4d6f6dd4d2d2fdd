"""Which way to run a unit is taken: by measurement where that is clear, by the cost model otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from slimkernels.conversion import measure
from slimkernels.conversion.analysis import fused_problems
from slimkernels.conversion.candidates import (
    MEASURED,
    Option,
    Unit,
    candidates,
    low_rank_problem,
    times_graphs,
    unchanged,
)
from slimkernels.conversion.graph import in_a_line
from slimkernels.conversion.plan import Policy, faster_everywhere
from slimkernels.conversion.spread import EXPLAINED, Ratio, everywhere, in_ms, ratio, worst
from slimkernels.dispatch.select import predicted_dense_seconds, predicted_seconds
from slimkernels.kernels import KERNELS

_FULL_MARGIN = 1.15
# A layer takes less than so many times its predicted time, or so many times 100 us, on any machine that runs it at all.
_STALLED, _LEAST_PREDICTION_S = 20, 1e-4


@dataclass(frozen=True)
class Decision:
    """The option taken, how the unit would stay dense, why, and the times of dense and of the best other option.

    The speed-up of the latter is between ``speedup_low`` and ``speedup_high`` at each example input. ``other`` is that
    option where it was timed. ``failure`` says which candidates raised an error, and what; the decision was made
    without them.
    """

    option: Option
    stay: Option
    reason: str
    dense_ms: tuple[float, ...] = ()
    other_ms: tuple[float, ...] = ()
    speedup_low: tuple[float, ...] = ()
    speedup_high: tuple[float, ...] = ()
    failure: str = ""
    other: Option | None = None


def decide(unit: Unit, policy: Policy) -> Decision:
    """The fastest way to run a unit that is faster than dense at every example input.

    A candidate that raises an error, out of memory included, drops out; where none can be built or measured at all, the
    unit stays as it is. `Decision.failure` says so.
    """
    try:
        return _decide(unit, policy)
    except Exception as error:  # one layer's trouble does not end the conversion of all others
        text = f"its candidates could not be built or measured: {in_a_line(error)}"
        stay = unchanged(unit)
        return Decision(stay, stay, text, failure=text)


def _decide(unit: Unit, policy: Policy) -> Decision:
    sizes = [call.input_shape for calls in unit.calls for call in calls] if unit.calls else None
    if unit.calls and not sizes:
        stay = unchanged(unit)
        return Decision(stay, stay, "the example inputs do not reach it, or with an empty batch only")
    found = candidates(unit, policy, sizes)
    if found.settled is not None:
        return Decision(found.settled, found.stay, found.why)
    if policy.measure and sizes:
        options = [*found.options, *found.fused]
        if not options:
            return Decision(found.stay, found.stay, found.why)
        decision = _by_measurement(unit, found.stay, options, policy)
        return replace(decision, reason=f"{found.why}; {decision.reason}") if found.why else decision
    if found.fused:
        return _fused_by_cost_model(unit, found.stay, found.options, found.fused[0], policy, sizes, found.why)
    if not found.options:
        return Decision(found.stay, found.stay, found.why)
    return _by_cost_model(unit, found.stay, found.options, policy, sizes is None)


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
    recorded = times_graphs(unit, policy)
    while options:
        every = [stay, *options]
        runs = [measure.LayerRun(nn.Sequential(*option.modules), inputs, unit.training) for option in every]

        def clear(found: list[measure.Seconds]) -> bool:
            ratios = [ratio(found[0], seconds) for seconds in found[1:]]
            return all(
                r.verdict(_needed(unit, o, stay, policy)) is not None and r.middle <= plausible(unit, o)
                for r, o in zip(ratios, options, strict=True)
            )

        limits = {"repeats": policy.repeats, "budget_s": policy.budget_s}
        try:
            timed = [measure.GraphRun(run) for run in runs] if recorded else runs
            held = measure.GraphRun.HELD if recorded else 1
            # For mypy: an int and a float, by name.
            found = measure.typical_seconds(timed, device=device, **limits, clear=clear, held=held)  # type: ignore[arg-type]
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
        by_name = f" by {option.kernel}" if option.kernel in MEASURED else ""
        return f"the candidate of {option.pattern.block_shape} blocks{by_name}"
    words = {"dense": "the merged dense layer", "fused": "the dense layer with its epilogue"}
    return words.get(option.format or "", "the low-rank layer")


def _needed(unit: Unit, option: Option, stay: Option, policy: Policy) -> float:
    """The speed-up from which an option is taken."""
    # A low-rank module is smaller than the dense layer it is compared with, so it stays where both are equally fast.
    even = unit.source == "low_rank" or (policy.prefer_smaller and _nbytes(option) < _nbytes(stay))
    return min(policy.min_speedup, 1.0) if even else policy.min_speedup


def _nbytes(option: Option) -> int:
    tensors = [t for module in option.modules for t in module.state_dict().values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def plausible(unit: Unit, option: Option) -> float:
    """The largest speed-up that is believed without another look, by the work that is saved."""
    stored = sum(p.numel() for module in option.modules for p in module.parameters() if p.dim() > 1)
    before = sum(p.numel() for module in unit.dense for p in module.parameters() if p.dim() > 1)
    return EXPLAINED * max(1.0, max(before, unit.weight.weight.numel()) / max(stored, 1))


def _fastest(unit: Unit, stay: Option, options: list[Option], policy: Policy) -> Decision:
    """The decision between options that all have been timed."""
    ratios = [[ratio(d, o) for d, o in zip(stay.seconds, option.seconds, strict=True)] for option in options]
    judged = [_judge(unit, stay, o, r, policy) for o, r in zip(options, ratios, strict=True)]
    taken: int | None = None
    for i, (passes, _) in enumerate(judged):
        # The candidates are in the order of their predicted times, and one takes another's place only where it is
        # clearly faster: what is stored should not change from one conversion to the next.
        if passes and (taken is None or _beats(options[i], options[taken])):
            taken = i
    dense_ms = tuple(1e3 * s for s in stay.seconds)
    shown = taken if taken is not None else max(range(len(options)), key=lambda i: worst(ratios[i]).middle)
    option, text = options[shown], judged[shown][1]
    if taken is not None and option.pattern is not None and option.pattern.nnz_blocks == option.pattern.blocks:
        text += ", with every block stored"
    if taken is not None and option.format == "fused":
        text += f" as it is, {option.kernel} taking in what follows"
    return Decision(
        stay if taken is None else option,
        stay,
        text,
        dense_ms,
        tuple(1e3 * s for s in option.seconds),
        tuple(r.low for r in ratios[shown]),
        tuple(r.high for r in ratios[shown]),
        other=option,
    )


def _beats(option: Option, other: Option) -> bool:
    return everywhere([ratio(b, a) for a, b in zip(option.seconds, other.seconds, strict=True)], 1 + 1e-9) is True


def _judge(unit: Unit, stay: Option, option: Option, ratios: list[Ratio], policy: Policy) -> tuple[bool, str]:
    """Whether a timed option is taken, and the rule that decided."""
    needed, least, baseline = _needed(unit, option, stay, policy), worst(ratios), _baseline(unit, stay)
    verdict, implausible = everywhere(ratios, needed), least.middle > plausible(unit, option)
    if _stalled(stay, option):
        verdict = None
    where = " at the least favourable input" if len(ratios) > 1 else ""
    if verdict is True and not implausible:
        return True, f"measured {least} the speed of {baseline}{where}"
    if verdict is not False:
        why = "too noisy to tell" if not implausible else "more than the saved work explains"
        measured = f"measured {least} the speed of {baseline}{where}, {why}"
        if policy.prefer_smaller and needed < policy.min_speedup:
            return True, f"{measured}; swapped, since it is smaller (Policy.prefer_smaller)"
        predicted = _predicted_speedup(unit, stay, option)
        if predicted is None:
            return False, f"{measured}, and the cost model knows nothing of it, so it stays"
        text = f"{measured}; the cost model predicts {predicted:.2f}x"
        # Without a block to leave out a gain rests on the kernels' fine points, which the cost model does not know.
        full = option.pattern is not None and option.pattern.nnz_blocks == option.pattern.blocks
        if predicted >= needed * (_FULL_MARGIN if full else 1.0):
            return True, f"{text}, so it is swapped"
        return False, f"{text}, and Policy.min_speedup asks for {needed:.2f}x, so it stays"
    at = ratios.index(least)
    times = f"{in_ms(stay.seconds[at])} against {in_ms(option.seconds[at])}"
    if least.middle <= 1:
        return False, f"{baseline} is as fast or faster: {times}{where}"
    text = f"too small a gain over {baseline}: {times}, {least}{where}"
    return False, f"{text}; Policy.min_speedup asks for {needed:.2f}x"


def _stalled(stay: Option, option: Option) -> bool:
    """Whether all readings are a scheduler's, not the layer's: every thread waited for one that had lost its core."""
    if option.pattern is None or not any(isinstance(s, measure.Seconds) for s in stay.seconds):
        return False
    predicted = max(sum(option.pattern.dense_s), _LEAST_PREDICTION_S)
    return min(sum(stay.seconds), sum(option.seconds)) > _STALLED * predicted


def _predicted_speedup(unit: Unit, stay: Option, option: Option) -> float | None:
    """By the cost model, at the least favourable size; None where it knows nothing."""
    sizes = [call.input_shape for calls in unit.calls for call in calls]
    if option.pattern is not None:
        dense, other = list(option.pattern.dense_s), list(option.pattern.predicted_s)
    elif option.format == "fused" and option.kernel is not None:
        asked = fused_problems(unit.weight, sizes, option.epilogue)
        dense = [predicted_seconds(KERNELS["fused_conv2d__reference"], p) for p in asked]
        other = [predicted_seconds(KERNELS[option.kernel], p) for p in asked]
    elif unit.chain is not None:
        dense, other = (_low_rank_seconds(unit, o) for o in (stay, option))
    else:
        return None
    return min(d / max(o, 1e-12) for d, o in zip(dense, other, strict=True))


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
    before, times = _low_rank_seconds(unit, stay), [_low_rank_seconds(unit, option) for option in options]
    best = min(range(len(options)), key=lambda i: sum(times[i]))
    ratio = min(b / max(t, 1e-12) for b, t in zip(before, times[best], strict=True))
    needed = min(policy.min_speedup, 1.0) if unit.source == "low_rank" else policy.min_speedup
    taken = options[best] if faster_everywhere(before, times[best], needed) else stay
    text = (
        f"by the cost model: predicted {ratio:.2f}x the speed of {_baseline(unit, stay)} at the least favourable size"
    )
    return Decision(taken, stay, text)


def _low_rank_seconds(unit: Unit, option: Option) -> list[float]:
    """Predicted seconds of a chain or low-rank module at every call, run as an option says."""
    found = []
    for call in (call for calls in unit.calls for call in calls):
        problem = low_rank_problem(unit, option.epilogue, call)
        reference = KERNELS[f"{problem.op}__reference"]
        spec = reference if option.kernel is None else KERNELS[option.kernel]
        dense = option.format == "dense"
        found.append(predicted_dense_seconds(problem) if dense else predicted_seconds(spec, problem))
    return found
