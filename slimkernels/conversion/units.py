"""Units of conversion: every layer with the batch norm, ReLU and pool behind it, or why it stays; plan entries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from slimkernels.conversion.analysis import obstacle_or_weight, weight_layer_names, zero_share
from slimkernels.conversion.batch_norms import restore_batch_norm_
from slimkernels.conversion.calls import capture
from slimkernels.conversion.candidates import Unit, dense_twin, low_rank_module
from slimkernels.conversion.decide import Decision
from slimkernels.conversion.factor_chains import FactorChain, find_chains
from slimkernels.conversion.folding import Tail, find_tail, fold_chain, fold_weight
from slimkernels.conversion.graph import (
    InputSet,
    ModelGraph,
    bake,
    copy_model,
    fx_graph,
    has_hooks,
    in_a_line,
    other_calls,
    parametrized_type,
    trace,
    unique_names,
)
from slimkernels.conversion.hub import unguard_publishing
from slimkernels.conversion.layers import (
    DROP_IN_LAYERS,
    FUSED_LAYERS,
    LOW_RANK_LAYERS,
    SPARSE_LAYERS,
    WEIGHT_LAYERS,
    LayerWeight,
    declared_block_shape,
    weight_obstacle,
)
from slimkernels.conversion.plan import LayerPlan, ModelPlan, Policy
from slimkernels.conversion.readers import weight_readers
from slimkernels.conversion.wrappers import plain_name
from slimkernels.formats import BlockMask, block_grid, block_shape_2d
from slimkernels.nn import LowRankConv2d, LowRankLinear

# Instance attributes of a converted model; a copy of it drops them.
PLAN_ATTRIBUTE = "slimkernels_plan"
GUARD_ATTRIBUTE = "train"
# A layer with more zeros than this is sparse, not a factor of a chain.
_FACTOR_ZEROS = 0.25


@dataclass
class Survey:
    """A prepared copy of the model and what was seen in it.

    Attributes:
        model: the copy.
        training: its mode.
        device: type of the device its parameters are on.
        units: what is decided.
        weights: readable weights of layers without an obstacle.
        obstacles: layers that cannot be taken, and why.
        excluded: layers that the policy leaves out.
        converted: layers that are drop-in modules already and stay as they are.
        foldable: batch norm -> layer with an obstacle that takes it all the same (groups, padding mode).
        batch_norm_reasons: why a batch norm that is not folded stays.
        notes: lines for the report.
        contiguous: modules whose outputs are made contiguous, see `slimkernels.conversion.output_layouts`.
        graph: of the copy in its mode.
    """

    model: nn.Module
    training: bool
    device: str
    units: list[Unit] = field(default_factory=list)
    weights: dict[str, LayerWeight] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    converted: set[str] = field(default_factory=set)
    foldable: dict[str, str] = field(default_factory=dict)
    batch_norm_reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    contiguous: set[str] = field(default_factory=set)
    graph: ModelGraph = field(default_factory=ModelGraph)

    @cached_property
    def fx_graph(self) -> fx.Graph | None:
        """Of the copy in eval mode, read once; None where it cannot be traced."""
        try:
            return fx_graph(self.model)
        except ValueError:
            return None

    def other_calls(self, converted: nn.Module) -> str | None:
        """Why the forward of a converted model does something else than that of the copy; None where it does not."""
        return other_calls(self.model, self.graph, converted, training=self.training)


@dataclass(frozen=True)
class _Structure:
    graph: ModelGraph
    uniques: Mapping[str, nn.Module]
    readers: Mapping[str, str]

    def tail(self, model: nn.Module, name: str, weight: Tensor) -> tuple[Tail, dict[str, str]]:
        return find_tail(model, self.graph, self.uniques, self.readers, name, weight)


def prepare(model: nn.Module, *, training: bool) -> nn.Module:
    """A copy of the model in the given mode; for inference, computed weights of its layers become plain ones."""
    copied = copy_model(model)
    for name in (PLAN_ATTRIBUTE, GUARD_ATTRIBUTE):
        copied.__dict__.pop(name, None)
    unguard_publishing(copied)
    nn.Module.train(copied, training)
    restore_batch_norm_(copied)
    if not training:
        for module in list(copied.modules()):
            if isinstance(module, WEIGHT_LAYERS):
                bake(module)
    return copied


def survey(model: nn.Module, sets: list[InputSet], policy: Policy, *, training: bool) -> Survey:
    """Copies the model and finds its units.

    Raises:
        ValueError: the model does not run on an example input; ``Policy.exclude`` names no layer.
    """
    layers = [(plain_name(name), module) for name, module in model.named_modules()]
    declared = {n: b for n, m in layers if (b := declared_block_shape(m)) is not None}
    masks = {n: mask for n, m in layers if (mask := _mask(m)) is not None}
    copied = prepare(model, training=training)
    names = weight_layer_names(copied)
    found = Survey(copied, training, next((t.device.type for t in copied.parameters()), "cpu"))
    earlier = getattr(model, PLAN_ATTRIBUTE, None)
    found.contiguous |= set(earlier.contiguous_outputs if isinstance(earlier, ModelPlan) else ())
    recorded = capture(copied, sets, names, training=training)
    graph = found.graph = trace(copied, training=training)
    # A model that is to be trained will be evaluated as well, and its eval mode may read what training does not.
    graphs = [graph, trace(copied)] if training else [graph]
    readers = weight_readers(copied, graphs, recorded.reads if sets else None)
    structure = _Structure(graph, unique_names(copied), readers)
    if graph.reason is not None and not training:
        found.notes.append(f"nothing is folded or fused: {graph.reason}")
    calls = recorded.calls
    found.excluded = _excluded(names, policy.exclude)
    for name in names:
        obstacle, weight = obstacle_or_weight(copied.get_submodule(name), name, structure.uniques, readers)
        if obstacle is None and sets and name not in calls:
            obstacle = "it is called with something else than one tensor"
        if obstacle is not None or weight is None:
            found.obstacles[name] = obstacle or "it has no weight"
        elif name not in found.excluded:
            module = structure.uniques[name]
            converted = training or isinstance(module, FUSED_LAYERS) or getattr(module, "epilogue", "none") != "none"
            if isinstance(module, DROP_IN_LAYERS) and converted:
                found.converted.add(name)
                continue
            found.weights[name] = replace(
                weight,
                block_shape=weight.block_shape or declared.get(name),
                requires_grad=weight.requires_grad and training,
            )
    _form_units(found, structure, calls, policy, masks)
    return found


def _excluded(names: Iterable[str], exclude: Iterable[str]) -> set[str]:
    """Layers that ``exclude`` names, by themselves, by a container or by a pattern. Raises ValueError where none is."""
    names, found = list(names), set()
    for wanted in exclude:
        hits = {n for n in names if n == wanted or n.startswith(wanted + ".") or fnmatchcase(n, wanted)}
        if not hits:
            near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names[:3]
            hint = f"near matches: {', '.join(near)}" if near else "the model has no layers with weights"
            raise ValueError(f"convert: expected Policy.exclude to name layers of the model, got {wanted!r}; {hint}")
        found |= hits
    return found


def _mask(module: nn.Module) -> Tensor | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
    chain: Any = module.parametrizations.weight  # type: ignore[union-attr]
    return next((p.mask for p in chain if isinstance(p, BlockMask)), None)


def _form_units(
    found: Survey, structure: _Structure, calls: Mapping[str, Any], policy: Policy, masks: Mapping[str, Tensor]
) -> None:
    modules = structure.uniques
    plain = {
        name: weight
        for name, weight in found.weights.items()
        if not isinstance(modules[name], DROP_IN_LAYERS) and zero_share(weight.weight) <= _FACTOR_ZEROS
    }
    chains = {c.names[0]: c for c in find_chains(structure.graph, plain, training=found.training)}
    inside = {name for chain in chains.values() for name in chain.names[1:]}
    for name, weight in found.weights.items():
        if name in inside:
            continue
        chain = chains.get(name) or module_chain(name, modules[name], weight)
        names = chain.names if chain is not None else (name,)
        tail = Tail()
        if not found.training:
            tail, reasons = structure.tail(found.model, names[-1], found.weights[names[-1]].weight)
            if tail.bn is not None and not policy.fold_bn:
                reasons, tail = {tail.bn: "Policy.fold_bn is off"}, Tail()
            found.batch_norm_reasons.update(reasons)
        try:
            found.units.append(_unit(found, names, chain, tail, calls.get(name, ()), masks.get(name)))
        except Exception as error:  # such as the product of two factors that does not fit into memory
            found.obstacles |= dict.fromkeys(names, f"it cannot be prepared: {in_a_line(error)}")
    if policy.fold_bn and not found.training:
        _fold_into_kept(found, structure)
    folded = {unit.tail.bn for unit in found.units} | set(found.foldable)
    for name, module in found.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in folded:
            why = structure.graph.reason or "its input does not come from one convolution alone"
            found.batch_norm_reasons.setdefault(name, "the model is to be trained" if found.training else why)


def _unit(
    found: Survey, names: tuple[str, ...], chain: FactorChain | None, tail: Tail, calls: Any, mask: Tensor | None
) -> Unit:
    weights = [found.weights[name] for name in names]
    source = "layer"
    module = found.model.get_submodule(names[0])
    if isinstance(module, SPARSE_LAYERS):
        source = "bsr"
    elif isinstance(module, LOW_RANK_LAYERS):
        source = "low_rank"
    if tail.bn is not None:
        bn = found.model.get_submodule(tail.bn)
        # For mypy: a batch norm, as the caller has found out.
        weights[-1] = fold_weight(weights[-1], bn)  # type: ignore[arg-type]
        # For mypy: a batch norm, as the caller has found out.
        chain = None if chain is None else fold_chain(chain, bn)  # type: ignore[arg-type]
    if found.training:
        dense = [found.model.get_submodule(name) for name in names]
    elif source == "low_rank":
        assert chain is not None
        dense = [low_rank_module(chain, "none", "auto").eval()]
    else:
        dense = [dense_twin(weight) for weight in weights]
    whole = weights[0] if chain is None else chain.merged()
    return Unit(names, whole, chain, dense, tail, calls, source, found.training, mask)


def _fold_into_kept(found: Survey, structure: _Structure) -> None:
    """Batch norm behind a convolution that stays for its groups or padding folds all the same."""
    for name in found.obstacles:
        module = structure.uniques.get(name)
        if type(module) is not nn.Conv2d or name in structure.readers:
            continue
        if has_hooks(module) or module.weight.is_meta or type(module.weight) is not nn.Parameter:
            continue
        tail, reasons = structure.tail(found.model, name, module.weight)
        found.batch_norm_reasons.update(reasons)
        if tail.bn is not None and module.weight.is_floating_point() and name not in found.excluded:
            found.foldable[tail.bn] = name


def module_chain(name: str, module: nn.Module, weight: LayerWeight) -> FactorChain | None:
    """The factors of a low-rank module; None for any other."""
    if isinstance(module, LowRankLinear):
        factors: tuple[Tensor, ...] = (module.V.detach(), module.U.detach())
        kind = "svd"
    elif isinstance(module, LowRankConv2d):
        factors, kind = tuple(f.detach() for f in module.factors), module.kind
    else:
        return None
    return FactorChain(
        (name,), kind, factors, weight.bias, weight.stride, weight.padding, weight.dilation, weight.requires_grad
    )


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stored_tensors(module: nn.Module) -> list[Tensor]:
    """What a module adds to a checkpoint."""
    return [
        t
        for t in module.state_dict().values()
        if isinstance(t, Tensor) and not isinstance(t, nn.UninitializedParameter)
    ]


def kept_plan(found: Survey, name: str, changed: nn.Module | None) -> LayerPlan:
    """The plan entry of a layer that stays, or of the refilled copy ``changed`` in its place."""
    original = found.model.get_submodule(name)
    module = changed or original
    weight: Any = getattr(module, "weight", None)
    readable = isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter)
    plain = readable and weight_obstacle(weight) is None
    kind = parametrized_type(original).__name__
    excluded = name in found.excluded
    stored = nbytes(stored_tensors(module))
    if isinstance(original, DROP_IN_LAYERS):
        reason = "excluded by the policy" if excluded else found.obstacles.get(name, "")
        return replace(drop_in_plan(name, original, reason), supported=name not in found.obstacles)
    return LayerPlan(
        name,
        kind,
        "keep",
        "excluded by the policy" if excluded else found.obstacles.get(name, ""),
        supported=name not in found.obstacles,
        weight_shape=tuple(weight.shape) if readable else None,
        bias=getattr(module, "bias", None) is not None,
        dtype=str(weight.dtype).removeprefix("torch.") if readable else None,
        sparsity=zero_share(weight.detach()) if plain else 0.0,
        bytes_dense=stored,
        bytes_stored=stored,
        mask_block_shape=declared_block_shape(module),
        folded_bn=name in found.foldable.values(),
    )


def swap_plan(found: Survey, unit: Unit, decision: Decision, policy: Policy) -> LayerPlan:
    """The plan entry of a unit's first layer, replaced by what was decided."""
    option, weight = decision.option, unit.weight
    sparsity = zero_share(weight.weight) if option.format != "low_rank" else 0.0
    plan = drop_in_plan(unit.names[0], option.modules[0], decision.reason)
    if found.training and option.format == "bsr" and sparsity > plan.block_sparsity + 1e-6:
        plan = replace(plan, reason=f"{plan.reason}; zeros inside its stored blocks become trainable")
    originals = [found.model.get_submodule(name) for name in unit.names]
    bias = 0 if weight.bias is None else weight.bias.numel() * weight.bias.element_size()
    return replace(
        plan,
        type=parametrized_type(originals[0]).__name__,
        kernel=option.kernel,
        sparsity=sparsity,
        bytes_dense=weight.nbytes + bias,
        dense_ms=decision.dense_ms,
        sparse_ms=decision.other_ms,
        speedup_low=decision.speedup_low,
        speedup_high=decision.speedup_high,
        folded_bn=unit.tail.bn is not None,
    )


def drop_in_plan(name: str, module: Any, reason: str) -> LayerPlan:
    """The plan entry that rebuilds a drop-in module, or the dense module that a chain was merged into."""
    stored = nbytes(stored_tensors(module))
    linear = isinstance(module, nn.Linear | LowRankLinear) or hasattr(module, "in_features")
    shape = (
        (module.out_features, module.in_features)
        if linear
        else (module.out_channels, module.in_channels, *module.kernel_size)
    )
    plan = LayerPlan(
        name,
        type(module).__name__,
        "swap",
        reason,
        format="dense",
        weight_shape=shape,
        bias=module.bias is not None,
        stride=None if linear else tuple(module.stride),
        padding=None if linear else tuple(module.padding),
        dilation=None if linear else tuple(module.dilation),
        dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
        bytes_dense=stored,
        bytes_stored=stored,
        channels_last=isinstance(module, nn.Conv2d) and module.weight.is_contiguous(memory_format=torch.channels_last),
    )
    if isinstance(module, SPARSE_LAYERS):
        rows, cols = block_grid(shape, module.block_shape)
        sparsity = 1 - module.weight_bsr().nnz_blocks / (rows * cols)
        plan = replace(plan, format="bsr", block_shape=block_shape_2d(module.block_shape), block_sparsity=sparsity)
    elif isinstance(module, FUSED_LAYERS):
        plan = replace(plan, format="fused")
    elif isinstance(module, LOW_RANK_LAYERS):
        ranks = tuple(module.ranks) if isinstance(module, LowRankConv2d) else (module.rank,)
        plan = replace(plan, format="low_rank", kind=getattr(module, "kind", "svd"), ranks=ranks)
    if plan.format != "dense":
        kernel = None if module.kernel == "auto" else module.kernel
        plan = replace(plan, epilogue=module.epilogue, kernel=kernel, tied=kernel is not None, channels_last=False)
    return plan
