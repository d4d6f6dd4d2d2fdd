"""`convert`: a model's sparse and low-rank layers replaced by drop-in modules where that is faster, batch norm folded.

Steps: copy the model and compute its masked weights; see which layer feeds which; group layers with the batch norm,
ReLU and pool behind them (`units`); decide each unit (`options`); put the modules in; compare and time the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import __version__
from slimkernels.conversion import measure
from slimkernels.conversion.analysis import weight_layer_names
from slimkernels.conversion.candidates import Unit
from slimkernels.conversion.decide import Decision, decide, plausible
from slimkernels.conversion.finish import finish
from slimkernels.conversion.folding import fold_tensors
from slimkernels.conversion.graph import (
    InputSet,
    copy_model,
    input_sets,
    parametrized_type,
    replace_module,
    scratch_copy,
)
from slimkernels.conversion.output_layouts import found_by_reading, found_by_running, found_with_strides
from slimkernels.conversion.outputs import Outputs, call_of, own_tensors
from slimkernels.conversion.plan import COST_MODEL, MEASURED, SHAPELESS, LayerPlan, ModelPlan, Policy
from slimkernels.conversion.spread import Ratio, everywhere, in_ms, ratio, worst
from slimkernels.conversion.units import (
    PLAN_ATTRIBUTE,
    Survey,
    drop_in_plan,
    kept_plan,
    nbytes,
    stored_tensors,
    survey,
    swap_plan,
)
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.nn.chained import chain_sequentials_
from slimkernels.nn.contiguous_output import keep_contiguous_
from slimkernels.progress import counting_bar

__all__ = ["convert"]

_LOG = logging.getLogger("slimkernels.convert")
# The whole model is timed for at most this many times Policy.budget_s.
_MODEL_BUDGET = 5
# Runs of the whole model spent on finding the layers that make its outputs differ: enough for three among a hundred.
_MAX_PROBES = 40


@torch.inference_mode(False)  # parameters made in inference mode could never be trained or copied
def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    policy: Policy | None = None,
    training: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose sparse and low-rank layers run as such, where that is faster than dense.

    Args:
        model: any module; it stays untouched. Zeros may come from anywhere: `prune_`, `torch.nn.utils.prune`,
            parametrizations, plain zeros; low rank from `factorize_` or from two or three consecutive thin layers. Of a
            wrapper (DataParallel, DistributedDataParallel, AveragedModel, `torch.compile`) the model inside is taken.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these,
            on the model's device. With them every decision is measured: no slower than dense at any of them. Without, a
            layer is swapped only where the cost model predicts a gain at every tabulated size.
        policy: see `slimkernels.Policy`.
        training: keep ``values`` trainable and fold nothing. Otherwise the result is an inference model in eval mode:
            batch norm folded, ReLU and 2x2 max-pool inside the kernels, replaced parameters without gradient;
            ``train(True)`` warns.
        strict: raise where a layer cannot be taken, or a candidate for it fails, instead of keeping it.
        progress: shows a bar on stderr if that is a terminal. The logger ``slimkernels.convert`` tells every decision
            at level DEBUG and each step at level INFO, with or without it.

    Returns:
        A model of the same class; batch norms, ReLUs and pools that went elsewhere are nn.Identity, and an
        nn.Sequential whose layers follow each other is a `slimkernels.nn.ChainedSequential`. `explain` tells what
        happened.

    Raises:
        TypeError: not a module, or one that cannot be copied; example inputs of another form.
        ValueError: the model does not run on the example inputs; ``Policy.exclude`` names no layer; with ``strict``,
            the layers that cannot be taken, each with its reason.
    """
    model = unwrapped("convert", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected an nn.Module, got {type(model).__name__}")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"convert: expected a Policy, got {type(policy).__name__}")
    policy = policy or Policy()
    sets = own_tensors(input_sets(example_inputs))
    found = survey(model, sets, policy, training=training)
    if strict:
        _refuse(found.obstacles)
    decisions = _decided(found, policy, progress=progress)
    if strict:
        _refuse({name: d.failure for name, d in decisions.items() if d.failure})
    fast, layers = _laid_out(found, decisions, policy, sets)
    problem = found.other_calls(fast)
    if problem is not None and policy.fuse_relu:  # most that ask for types ask for ReLUs
        unfused = replace(policy, fuse_relu=False)
        others = _decided(found, unfused, progress=progress)
        laid_out = _laid_out(found, others, unfused, sets)
        if found.other_calls(laid_out[0]) is None:
            found.notes.append(f"no ReLU is fused: {problem}")
            policy, decisions, (fast, layers), problem = unfused, others, laid_out, None
    if problem is not None:
        agreeing = _agreeing(found, decisions, policy, found.other_calls, problem)
        if agreeing is not None:
            found.notes.append(f"some layers were put back: {problem}")
            decisions, problem = agreeing, None
            fast, layers = _laid_out(found, decisions, policy, sets)
    plan = ModelPlan(
        tuple(layers),
        SHAPELESS if not sets else MEASURED if policy.measure else COST_MODEL,
        training,
        found.device,
        torch.get_num_threads(),
        {"slimkernels": __version__, "torch": torch.__version__},
        notes=tuple(found.notes),
    )
    if problem is not None:
        fast, plan = _unchanged(found, plan, problem)
    elif sets and policy.measure and policy.check_model and not training:
        fast, plan = _checked(found, decisions, fast, plan, sets, policy)
    plan = replace(plan, layers=_with_earlier(plan.layers, getattr(model, PLAN_ATTRIBUTE, None), fast))
    contiguous = tuple(sorted(found.contiguous))
    if contiguous:
        note = f"made contiguous, as the model's own code takes them: outputs of {', '.join(contiguous)}"
        plan = replace(plan, contiguous_outputs=contiguous, notes=(*plan.notes, note))
    return finish(fast, plan)


def _decided(found: Survey, policy: Policy, *, progress: bool) -> dict[str, Decision]:
    """The decision of every unit, by its first layer."""
    _LOG.info("deciding %d layers (%s)", len(found.units), found.device)
    decisions: dict[str, Decision] = {}
    with counting_bar(progress, "converting", len(found.units)) as advance:
        for unit in found.units:
            name = unit.names[0]
            decisions[name] = decided = decide(unit, policy)
            swapped = "stays" if decided.option is decided.stay else "is swapped"
            _LOG.debug("%s %s: %s", name, swapped, decided.reason)
            advance(1, name)
    _LOG.info("%d layers are to be swapped", sum(d.option is not d.stay for d in decisions.values()))
    return decisions


def _refuse(reasons: Mapping[str, str]) -> None:
    if reasons:
        kept = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"convert: strict=True, and these layers cannot be taken: {kept}")


def _with_earlier(layers: tuple[LayerPlan, ...], earlier: Any, model: nn.Module) -> tuple[LayerPlan, ...]:
    """Of a model that was converted before: what was folded and fused then."""
    if not isinstance(earlier, ModelPlan):
        return layers
    names = {layer.name for layer in layers}
    kept = [
        layer
        for layer in earlier.layers
        if layer.into in names and layer.name not in names and type(model.get_submodule(layer.name)) is nn.Identity
    ]
    return (*layers, *kept)


def _laid_out(
    found: Survey, decisions: Mapping[str, Decision], policy: Policy, sets: list[InputSet]
) -> tuple[nn.Module, list[LayerPlan]]:
    """`_apply`, with ``found.contiguous`` as the model's own code then needs it."""
    fast, layers = _apply(found, decisions, policy)
    if sets:
        found.contiguous.update(found_by_running(fast, sets), found_with_strides(found.fx_graph))
    elif any(layer.action == "swap" for layer in layers):
        found.contiguous.update(found_by_reading(found.fx_graph))
    return keep_contiguous_(fast, found.contiguous), layers


def _apply(
    found: Survey, decisions: Mapping[str, Decision], policy: Policy, *, channels_last: bool | None = None
) -> tuple[nn.Module, list[LayerPlan]]:
    """A model with the decisions put in, and its plan's layers. ``channels_last``: of kept convolutions."""
    if channels_last is None:  # beside swapped layers, whose activations (or merged weights) are channels_last
        swapped = any(d.option.format is not None for d in decisions.values())
        channels_last = swapped and not found.training
    changes: dict[str, nn.Module] = {}
    plans: dict[str, LayerPlan] = {}
    for unit in found.units:
        _apply_unit(found, unit, decisions[unit.names[0]], policy, channels_last, changes, plans)
    for bn_name, name in found.foldable.items():
        conv = found.model.get_submodule(name)
        bn = found.model.get_submodule(bn_name)
        # For mypy: a batch norm, as the caller has found out.
        changes[name] = _refilled(conv, *fold_tensors(conv.weight, conv.bias, bn))  # type: ignore[arg-type]
        changes[bn_name] = nn.Identity()
        plans[bn_name] = _folded_bn_plan(found, bn_name, name)
    for name in found.obstacles | dict.fromkeys(found.excluded, "excluded by the policy"):
        plans[name] = kept_plan(found, name, changes.get(name))
    for name in found.converted:
        plans[name] = drop_in_plan(name, found.model.get_submodule(name), "it is converted already")
    for name, reason in found.batch_norm_reasons.items():
        kind = type(found.model.get_submodule(name)).__name__
        plans.setdefault(name, LayerPlan(name, kind, "keep", f"not folded: {reason}"))
    fast = copy_model(found.model, share_parameters=True)
    for name, module in changes.items():
        replace_module(fast, name, module)
    keep_contiguous_(fast, found.contiguous)
    if not found.training:
        chain_sequentials_(fast)  # as `finish` does, here for the comparisons and the times
    order = {name: i for i, (name, _) in enumerate(found.model.named_modules())}
    return fast, sorted(plans.values(), key=lambda p: order[p.name])


def _apply_unit(
    found: Survey,
    unit: Unit,
    decision: Decision,
    policy: Policy,
    channels_last: bool,
    changes: dict[str, nn.Module],
    plans: dict[str, LayerPlan],
) -> None:
    option, tail, head = decision.option, unit.tail, unit.names[0]
    into = head if option.format is not None else unit.names[-1]
    if option.format is not None:
        changes[head] = option.modules[0]
        plans[head] = swap_plan(found, unit, decision, policy)
        for name in unit.names[1:]:
            changes[name] = nn.Identity()
            kind = parametrized_type(found.model.get_submodule(name)).__name__
            plans[name] = LayerPlan(name, kind, "fold", f"a factor, inside {head}", into=head)
    else:
        for name, module in zip(unit.names, unit.dense, strict=True):
            folded = tail.bn is not None and name == into
            relaid = channels_last and isinstance(module, nn.Conv2d)
            if folded or relaid:
                changes[name] = module if relaid else _plain_layout(module)
            plans[name] = replace(
                kept_plan(found, name, changes.get(name)),
                reason=decision.reason,
                supported=True,
                folded_bn=folded,
                channels_last=relaid,
                dense_ms=decision.dense_ms,
                sparse_ms=decision.other_ms,
                speedup_low=decision.speedup_low,
                speedup_high=decision.speedup_high,
            )
    if tail.bn is not None:
        changes[tail.bn] = nn.Identity()
        plans[tail.bn] = _folded_bn_plan(found, tail.bn, into)
    fused = {"none": (), "relu": (tail.relu,), "relu_maxpool2": (tail.relu, tail.pool)}[option.epilogue]
    for name in filter(None, fused):
        changes[name] = nn.Identity()
        kind = type(found.model.get_submodule(name)).__name__
        plans[name] = LayerPlan(name, kind, "fuse", f"in the epilogue of {into}", into=into)


def _folded_bn_plan(found: Survey, name: str, into: str) -> LayerPlan:
    nbytes_before = nbytes(stored_tensors(found.model.get_submodule(name)))
    return LayerPlan(name, "BatchNorm2d", "fold", f"inside {into}", into=into, bytes_dense=nbytes_before)


def _plain_layout(module: nn.Module) -> nn.Module:
    return module if isinstance(module, nn.Linear) else module.to(memory_format=torch.contiguous_format)


def _refilled(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a layer with another weight and bias."""
    copied = copy_model(module, share_parameters=True)
    copied.weight = nn.Parameter(weight, requires_grad=False)
    copied.bias = nn.Parameter(bias, requires_grad=False)
    return copied


def _checked(
    found: Survey,
    decisions: Mapping[str, Decision],
    fast: nn.Module,
    plan: ModelPlan,
    sets: list[InputSet],
    policy: Policy,
) -> tuple[nn.Module, ModelPlan]:
    """The converted model if it computes the same as the original and is not slower than dense; else the dense one.

    Layers that make the outputs differ are put back. Layers that are slower alone are swapped where the whole model is
    faster with them, see `_all_swapped`. Dense is the faster of the model as it was and its twin with batch norm folded
    and weights in channels_last.
    """
    _LOG.info("comparing and timing the whole model")
    outputs = Outputs(found.model, sets)
    problem = outputs.difference(fast)
    if problem is not None:
        agreeing = _agreeing(found, decisions, policy, outputs.difference, problem)
        if agreeing is None:
            return _unchanged(found, plan, problem)
        decisions = agreeing
        fast, layers = _apply(found, decisions, policy)
        plan = replace(plan, layers=tuple(layers), notes=(*plan.notes, f"some layers were put back: {problem}"))
    everything = _all_swapped(found, decisions)
    if everything is not None:
        all_swapped, all_layers = _laid_out(found, everything, policy, sets)
        if outputs.difference(all_swapped) is not None or found.other_calls(all_swapped) is not None:
            everything = None
    if everything is None and not any(d.option is not d.stay for d in decisions.values()):
        return fast, plan
    staying = {name: replace(d, option=d.stay) for name, d in decisions.items()}
    dense, _ = _apply(found, staying, policy, channels_last=True)
    models = [scratch_copy(m) for m in (found.model, dense, fast, *([all_swapped] if everything else []))]
    if policy.serve is not None:
        inputs = [kwargs if kwargs else args for args, kwargs in sets]
        # For mypy: whatever is served is called as the model is.
        models = [policy.serve(m, inputs) for m in models]  # type: ignore[misc]
        plan = replace(plan, notes=(*plan.notes, "the whole model was timed as Policy.serve serves it"))
    needed = min(policy.min_speedup, 1.0)
    # As a whole a model gains no more than the layer that gains most.
    chosen = [(unit, (everything or decisions)[unit.names[0]]) for unit in found.units]
    most = max(plausible(unit, d.option) for unit, d in chosen if d.option is not d.stay)

    def clear(seconds: list[measure.Seconds]) -> bool:
        now = ratio(min(seconds[0], seconds[1]), seconds[2])
        return now.verdict(needed) is not None and now.middle <= most

    times: list[list[float]] = []
    for args, kwargs in sets:
        runs = [call_of(m, args, kwargs) for m in models]
        limits = {"repeats": policy.repeats, "budget_s": _MODEL_BUDGET * policy.budget_s}
        found_s = measure.typical_seconds(
            runs,
            device=found.device,
            **limits,  # type: ignore[arg-type]  # an int and a float, by name
            clear=clear,
        )
        times.append(list(found_s))
    best_dense = [min(t[0], t[1]) for t in times]
    converted = [t[2] for t in times]
    gains = [] if everything is None else [ratio(t[2], t[3]) for t in times]
    if everything is not None and everywhere(gains, 1 + 1e-9) is True:
        said = f"among its neighbours it is swapped: the whole model is {worst(gains)} as fast so"
        added = {name for name, d in everything.items() if d.option is not decisions[name].option}
        layers = [replace(p, reason=f"{p.reason}; {said}") if p.name in added else p for p in all_layers]
        fast, decisions, converted = all_swapped, everything, [t[3] for t in times]
        plan = replace(plan, layers=tuple(layers))
    elif not any(d.option is not d.stay for d in decisions.values()):
        return fast, plan
    ratios = [ratio(d, c) for d, c in zip(best_dense, converted, strict=True)]
    plan = replace(
        plan,
        dense_ms=tuple(1e3 * t for t in best_dense),
        converted_ms=tuple(1e3 * t for t in converted),
        speedup_low=tuple(r.low for r in ratios),
        speedup_high=tuple(r.high for r in ratios),
    )
    notes = [_beyond(i, r, most) for i, r in enumerate(ratios) if r.middle > most]
    plan = replace(plan, notes=(*plan.notes, *notes))
    verdict, least = everywhere(ratios, needed), worst(ratios)
    at = ratios.index(least)
    if verdict is True:
        return fast, plan
    if verdict is None:
        note = (
            f"the whole model at example input {at} is {least} the speed of dense, too noisy to tell: its layers decide"
        )
        return fast, replace(plan, notes=(*plan.notes, note))
    text = (
        f"the whole model is not faster with swapped layers: {in_ms(converted[at])} against "
        f"{in_ms(best_dense[at])} dense at example input {at}"
    )
    relaid = all(t[1] <= t[0] for t in times)
    # A layer that came low-rank stays so where the model as it was beat its merged twin.
    low_rank = set() if relaid else {u.names[0] for u in found.units if u.source == "low_rank"}
    staying = {
        name: d
        if d.option is d.stay or (name in low_rank and d.option.format == "low_rank")
        else replace(d, option=d.stay, reason=text)
        for name, d in decisions.items()
    }
    fast, layers = _apply(found, staying, policy, channels_last=relaid)
    plan = replace(plan, layers=tuple(layers), notes=(*plan.notes, text))
    return fast, replace(plan, converted_ms=(), speedup_low=(), speedup_high=())


def _all_swapped(found: Survey, decisions: Mapping[str, Decision]) -> dict[str, Decision] | None:
    """The decisions with every layer swapped that stayed dense and has a block-sparse candidate; None for no reason to.

    On a CPU native layers that follow each other run as one chain, in a layout in which thin layers are several times
    as fast and which one dense layer among them ends. A layer that is timed alone pays for two changes of layout.
    SlimNets' NIN, 87.5% single zero weights, batch 128, recorded on two Zen 3 cores: 1.1 times as fast as dense with
    two of nine layers dense, 3.7 times with none.
    """
    stayed = {
        name: d.other
        for name, d in decisions.items()
        if d.option is d.stay and d.other is not None and d.other.pattern is not None
    }
    every = {name: replace(d, option=stayed.get(name, d.option)) for name, d in decisions.items()}
    patterns = [d.option.pattern for d in every.values() if d.option is not d.stay]
    sparse = any(pattern is not None and pattern.nnz_blocks < pattern.blocks for pattern in patterns)
    return every if found.device == "cpu" and stayed and len(patterns) > 1 and sparse else None


def _beyond(i: int, found: Ratio, most: float) -> str:
    return (
        f"at example input {i} the whole model was measured {found} the speed of dense, which is more than the saved "
        f"work explains (at most {most:.0f}x): other work on this machine disturbed it, measure again"
    )


def _agreeing(
    found: Survey,
    decisions: Mapping[str, Decision],
    policy: Policy,
    difference: Callable[[nn.Module], str | None],
    problem: str,
) -> dict[str, Decision] | None:
    """The decisions without the swaps that make a difference, such as one of outputs, as few as a bisection finds.

    None where there is one with every layer dense as well.
    """
    swapped = [name for name, decision in decisions.items() if decision.option is not decision.stay]
    probes = 0

    def keeping(names: list[str]) -> dict[str, Decision]:
        put_back = {name for name in swapped if name not in names}
        return {
            name: replace(d, option=d.stay, reason=f"with it swapped, {problem}") if name in put_back else d
            for name, d in decisions.items()
        }

    def agrees(names: list[str]) -> bool:
        nonlocal probes
        probes += 1
        return difference(_apply(found, keeping(names), policy)[0]) is None

    if not agrees([]):
        return None
    kept: list[str] = []
    todo = [swapped]
    while todo:
        names = todo.pop()
        if len(names) < len(swapped) and probes < _MAX_PROBES and agrees(kept + names):
            kept += names
        elif len(names) > 1:
            todo += [names[len(names) // 2 :], names[: len(names) // 2]]
    return keeping(kept)


def _unchanged(found: Survey, plan: ModelPlan, problem: str) -> tuple[nn.Module, ModelPlan]:
    """The prepared copy as it is, with every layer kept for one reason."""
    layers = [
        replace(kept_plan(found, name, None), reason=found.obstacles.get(name, problem))
        for name in weight_layer_names(found.model)
    ]
    return copy_model(found.model, share_parameters=True), replace(
        plan, layers=tuple(layers), notes=(*plan.notes, problem)
    )
