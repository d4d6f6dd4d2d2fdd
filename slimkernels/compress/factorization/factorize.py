"""Low-rank factorization of a model: Linear and Conv2d layers become two or three thin layers.

The arithmetic is in `decompositions` and `whitening`, the choice of ranks in `layer_ranks`, the twin of one layer in
`twins`; this module goes through the model, with one record a layer, and keeps what `factorization_report` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.compress.factorization.decompositions import svd_conv, tai, truncated_svd, tucker2
from slimkernels.compress.factorization.layer_costs import Budget, factor_params
from slimkernels.compress.factorization.layer_ranks import FactorizableLayer, Ranks, asked_ranks, ranks_within
from slimkernels.compress.factorization.ranks import check_energy, lost_shares, rank_by_energy
from slimkernels.compress.factorization.twins import (
    batch_norm_size,
    decomposed,
    low_rank_part,
    low_rank_twin,
    relative_error,
    with_batch_norm,
)
from slimkernels.compress.factorization.whitening import match_batch_norms, output_moments, refit_last_factors
from slimkernels.compress.selection import SelectedLayer, select_layers
from slimkernels.compress.training.evaluation import device_of
from slimkernels.conversion.calls import capture
from slimkernels.conversion.graph import input_sets
from slimkernels.conversion.readers import weight_readers
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.formats import LOW_RANK_KINDS
from slimkernels.nn import (
    guard_strided_pointwise_,
    unsupported_conv_reason,
)
from slimkernels.nn.strided_pointwise import PixelsRead

Rank = int | Sequence[int]

__all__ = [
    "Budget",
    "LayerFactorization",
    "factorization_report",
    "factorize_",
    "rank_by_energy",
    "svd_conv",
    "tai",
    "truncated_svd",
    "tucker2",
]

_REPORT = "_slimkernels_factorization"


@dataclass(frozen=True)
class LayerFactorization:
    """What `factorize_` did to one layer; ``kind`` is None where it was left dense, for ``reason``.

    ``ranks`` is ``(rank,)``, or ``(rank_in, rank_out)`` for "tucker2"; ``relative_error`` is the Frobenius norm of
    the weight's change over that of the weight; parameters count the weight, not the bias. ``output_error`` is the same
    of the layer's outputs (without bias) on the calibration data, None where those did not count; ``batch_norm`` says
    that one was put behind the layer.
    """

    name: str
    kind: str | None
    ranks: tuple[int, ...]
    relative_error: float
    params_before: int
    params_after: int
    reason: str
    output_error: float | None = None
    batch_norm: bool = False


@dataclass(frozen=True)
class _Asked:
    """Where the ranks of a call come from: exactly one of ``rank``, ``energy`` and ``budget`` is given."""

    rank: int | str | Mapping[str, Rank] | None
    energy: float | None
    budget: Budget | None

    @classmethod
    def checked(cls, method: str, rank: Any, energy: float | None, budget: Any, multiple: Any) -> _Asked:
        """Raises ValueError or TypeError as `factorize_`."""
        if method not in LOW_RANK_KINDS:
            raise ValueError(f"factorize_: expected method in {LOW_RANK_KINDS}, got {method!r}")
        if sum(way is not None for way in (rank, energy, budget)) != 1:
            raise ValueError(
                f"factorize_: expected one of rank, energy and budget, got rank={rank}, energy={energy}, "
                f"budget={budget}"
            )
        if energy is not None:
            check_energy("factorize_", energy)
        if isinstance(rank, str) and rank != "vbmf":
            raise ValueError(f"factorize_: expected rank to be numbers or 'vbmf', got {rank!r}")
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
            raise ValueError(f"factorize_: expected multiple to be a positive int, got {multiple!r}")
        return cls(rank, energy, None if budget is None else Budget.of(budget))

    def ranks(self, job: _Job) -> Ranks:
        """Those of one layer, where no budget binds all of them together."""
        if self.energy is not None:
            return job.by_energy(self.energy)
        if self.rank == "vbmf":
            return job.by_vbmf()
        return asked_ranks(job, self.rank[job.key or job.name] if isinstance(self.rank, Mapping) else self.rank)


@dataclass(frozen=True)
class _Data:
    """The calibration data, and how many of its batches to use."""

    batches: Iterable[Any]
    count: int | None


@dataclass
class _Job(FactorizableLayer):
    """One layer that `factorize_` can factorize, and what becomes of it.

    Attributes:
        key: the name or pattern that picked it.
        batch_norm: whether one goes behind it.
        ranks: None where the budget has room for it as it is.
        twin: what takes its place, None where it stays dense.
        record: for the report, once the twin was made or refused.
    """

    key: str | None = None
    batch_norm: bool = False
    ranks: Ranks | None = None
    twin: nn.Module | None = None
    record: LayerFactorization | None = None


def factorize_(
    model: nn.Module,
    method: str = "svd",
    *,
    rank: int | str | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    multiple: int | None = None,
    batch_norm: bool = False,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Replaces Linear and Conv2d layers in place by `nn.LowRankLinear` and `nn.LowRankConv2d` with trainable factors.

    Linear layers and 1x1 convolutions are always split by the plain SVD. Stride, padding, dilation, bias, dtype,
    device, train mode and ``requires_grad`` carry over exactly. The factors are new Parameters: build the optimiser
    afterwards.

    A layer is left dense, with the reason in `factorization_report`, where the factors would hold no fewer
    parameters than the weight, where it is grouped, pads by other than zeros, is a sub-class, carries hooks or
    parametrizations, or where something else than its own call reads its weight (a tied embedding, torch's attention,
    a forward that uses ``layer.weight``; see `slimkernels.conversion.readers`). A layer given by its exact name is
    factorized even where it does not shrink; where it cannot be, the call raises.

    Ranks come from exactly one of ``rank``, ``energy`` and ``budget``. A rank that is named is taken as it is; one that
    is chosen is rounded up to what the kernels like, wherever that stays smaller than dense.

    Args:
        model: any module holding nn.Linear or nn.Conv2d below itself. Of a wrapper (DataParallel,
            DistributedDataParallel, AveragedModel, `torch.compile`) the model inside is factorized, by its own names.
        method: "svd" (kxk then 1x1), "tai" (kx1 then 1xk) or "tucker2" (1x1, kxk, 1x1).
        rank: one rank for all layers, capped for "tucker2" at the channel counts; or a dict from layer name or
            fnmatch pattern to a rank, ``(rank_in, rank_out)`` allowed for "tucker2", which then also says which
            layers are factorized; or "vbmf", see `ranks.vbmf_rank`.
        energy: the share of each weight's squared norm to keep, in (0, 1]; the rank is the smallest that does (for
            "tucker2" each of the two modes may lose half of the rest, which keeps at least this share).
        budget: what the whole model may cost at most: ``{"bytes": 2_000_000}``, ``{"parameters": 0.4}``,
            ``{"flops": 0.5}``, ``{"latency": 0.6}``, see `layer_costs.Budget`. Ranks are spread over the layers by
            energy kept per cost, see `ranks.rank_for_budget`; a layer may stay dense.
        layers: names or fnmatch patterns of the layers to factorize.
        exclude: names or fnmatch patterns of layers that stay as they are.
        multiple: chosen ranks are multiples of it; by default 8 on the CPU and 16 on a GPU. 1 does not round.
        batch_norm: puts a BatchNorm2d behind every factorized convolution that has none there yet, as SlimNets and Tai
            et al. do; the layer becomes a Sequential of ``low_rank`` and ``batch_norm``. It starts as the identity on
            the calibration data, or without them with mean 0 and variance 1.
        calibration: batches of images, or sequences that begin with them, such as a loader, which has to be iterable
            more than once. Layers split by the SVD then change their outputs on these data, rather than their weights,
            by as little as possible at their rank, and energy means that of their outputs; of "tai" and "tucker2" the
            last factor is fitted to the data (see `whitening`).
        calibration_batches: uses so many batches only.
        example_inputs: tensor, or tuple of arguments, whose sizes count for budgets of FLOPs and time. A run on them
            also shows which weights are read, where a model cannot be traced.

    Returns:
        What was passed as ``model``.

    Raises:
        ValueError: not exactly one of rank, energy and budget, one of them out of range, an unknown name (near matches
            are listed), a named layer that cannot be factorized, or calibration data that do not reach a layer. Nothing
            is changed then.
        TypeError: an argument of the wrong type.
    """
    given, model = model, unwrapped("factorize_", model)
    asked = _Asked.checked(method, rank, energy, budget, multiple)
    types = (nn.Linear, nn.Conv2d)
    if isinstance(rank, Mapping):
        if layers is not None:
            raise ValueError(
                "factorize_: expected either layers or a rank dict, got both; the dict's keys are the layers"
            )
        picked = select_layers("factorize_", model, types, rank, exclude, "rank")
    else:
        picked = select_layers("factorize_", model, types, layers, exclude)

    jobs, refused = _jobs(model, picked, method, multiple, example_inputs)
    data = None if calibration is None else _Data(calibration, calibration_batches)
    if data is not None:
        _set_moments(model, jobs, data)
    if batch_norm:
        _set_batch_norms(model, jobs)
    _set_ranks(model, jobs, asked, example_inputs)
    for job in jobs:
        _make_twin(job, method)
    done = [job for job in jobs if job.twin is not None]
    if data is not None:
        _refit(model, done, data)
    _replace(model, {id(job.module): job.twin for job in done if job.twin is not None})
    if data is not None:
        _match_batch_norms(model, done, data)
    guard_strided_pointwise_(model)
    records = refused | {job.name: job.record for job in jobs}
    in_order = {layer.name: records[layer.name] for layer in picked}
    object.__setattr__(model, _REPORT, {**getattr(model, _REPORT, {}), **in_order})
    return given


def factorization_report(model: nn.Module) -> tuple[LayerFactorization, ...]:
    """What `factorize_` did to each layer it looked at; empty where it was never called on this model."""
    return tuple(getattr(unwrapped("factorization_report", model), _REPORT, {}).values())


def _jobs(
    model: nn.Module, picked: Sequence[SelectedLayer], method: str, multiple: int | None, example_inputs: Any
) -> tuple[list[_Job], dict[str, LayerFactorization | None]]:
    """The layers that can be factorized, and by name why others cannot."""
    jobs: list[_Job] = []
    refused: dict[str, LayerFactorization | None] = {}
    readers = _weight_readers(model, example_inputs) if picked else {}
    for layer in picked:
        refusal = _refusal(layer, model, readers)
        if refusal is None:
            kind = _kind(layer.module, method)
            jobs.append(_Job(layer.name, layer.module, kind, layer.explicit, asked_multiple=multiple, key=layer.key))
            jobs[-1].check_finite()
            continue
        if layer.explicit or layer.module is model:
            raise ValueError(f"factorize_: layer {layer.name!r}: {refusal}")
        refused[layer.name] = _kept(layer.name, layer.module, refusal)
    return jobs, refused


def _set_moments(model: nn.Module, jobs: Sequence[_Job], data: _Data) -> None:
    """Of the outputs of what the SVD splits, on the calibration data."""
    split = {job.name: job for job in jobs if job.kind == "svd"}
    if split:
        modules = {name: job.module for name, job in split.items()}
        for name, moment in output_moments("factorize_", model, modules, data.batches, data.count).items():
            split[name].moment = moment


def _set_batch_norms(model: nn.Module, jobs: Sequence[_Job]) -> None:
    """For convolutions that no BatchNorm2d follows directly; all of them where the model cannot be traced."""
    from slimkernels.conversion.graph import trace

    graph = trace(model)
    for job in jobs:
        if isinstance(job.module, nn.Conv2d):
            follower = next(iter(graph.chain(job.name)), None)
            job.batch_norm = follower is None or not isinstance(model.get_submodule(follower), nn.BatchNorm2d)


def _set_ranks(model: nn.Module, jobs: Sequence[_Job], asked: _Asked, example_inputs: Any) -> None:
    if asked.budget is None:
        for job in jobs:
            job.ranks = asked.ranks(job)
        return
    extra = {job.name: batch_norm_size(job.module) for job in jobs if job.batch_norm}
    chosen = ranks_within(model, jobs, asked.budget, example_inputs, _twin_of_ranks, extra)
    for job in jobs:
        job.ranks = chosen[job.name]


def _twin_of_ranks(layer: FactorizableLayer, ranks: Ranks) -> nn.Module:
    return low_rank_twin(layer.module, decomposed(layer, ranks), layer.kind)


def _make_twin(job: _Job, method: str) -> None:
    """Factorizes a layer at its ranks, unless it stays dense; the record says why."""
    module, kind, ranks, name = job.module, job.kind, job.ranks, job.name
    weight = module.weight.detach()
    if ranks is None:
        job.record = _kept(name, module, "the budget has room for it as it is")
        return
    if kind != "tucker2" and ranks[0] > job.full_rank:
        if job.explicit:
            raise ValueError(
                f"factorize_: layer {name!r}: expected rank in [1, {job.full_rank}] for a weight "
                f"{tuple(weight.shape)}, got {ranks[0]}"
            )
        job.record = _kept(name, module, f"rank {ranks[0]} exceeds the full rank {job.full_rank}")
        return
    after = factor_params(job.shape, kind, ranks)
    if after >= weight.numel() and not job.explicit:
        reason = f"rank {ranks[::-1]} needs {after} parameters, the dense weight {weight.numel()}"
        job.record = _kept(name, module, reason)
        return
    factors = decomposed(job, ranks)
    twin: nn.Module = low_rank_twin(module, factors, kind)
    job.twin = with_batch_norm(twin, module) if job.batch_norm else twin
    job.record = LayerFactorization(
        name=name,
        kind=kind,
        ranks=ranks[::-1],
        relative_error=relative_error(job.dense, factors, kind),
        params_before=weight.numel(),
        params_after=after,
        reason=f"svd instead of {method}: one tap" if kind != method else "",
        output_error=None if job.moment is None else float(lost_shares(job.spectra[0])[ranks[0]]) ** 0.5,
        batch_norm=job.batch_norm,
    )


def _refit(model: nn.Module, done: Sequence[_Job], data: _Data) -> None:
    """Fits the last factor of what the SVD does not split to the calibration data."""
    jobs = {job.name: job for job in done if job.kind != "svd"}
    if not jobs:
        return
    chains = {name: (job.module, low_rank_part(job.twin)) for name, job in jobs.items()}
    errors = refit_last_factors("factorize_", model, chains, data.batches, data.count)
    for name, error in errors.items():
        job = jobs[name]
        assert job.record is not None
        change = relative_error(job.dense, low_rank_part(job.twin).factors, job.kind)
        job.record = replace(job.record, relative_error=change, output_error=error)


def _match_batch_norms(model: nn.Module, done: Sequence[_Job], data: _Data) -> None:
    """Makes the new batch norms the identity on the calibration data."""
    norms = {job.name: job.twin.batch_norm for job in done if job.batch_norm and isinstance(job.twin, nn.Sequential)}
    if norms:
        # For mypy: there are calibration data wherever there are norms to match.
        match_batch_norms("factorize_", model, norms, data.batches, data.count)  # type: ignore[arg-type]


def _kind(module: nn.Module, method: str) -> str:
    return method if isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1 else "svd"


def _replace(model: nn.Module, twins: Mapping[int, nn.Module]) -> None:
    """Puts twins in the place of modules, wherever these are registered."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in twins:
                setattr(parent, child_name, twins[id(child)])


def _weight_readers(model: nn.Module, example_inputs: Any) -> dict[int, str]:
    """By the id of a module: why its weight is not its own alone, a module under several names being one."""
    seen = None
    if example_inputs is not None:
        device = device_of(model)
        sets = [
            (tuple(x.to(device) if isinstance(x, Tensor) else x for x in args), kwargs)
            for args, kwargs in input_sets(example_inputs)
        ]
        layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        seen = capture(model, sets, layers, op="factorize_").reads
    return {id(model.get_submodule(name)): why for name, why in weight_readers(model, seen=seen).items()}


def _kept(name: str, module: Any, reason: str) -> LayerFactorization:
    count = math.prod(module.weight.shape)
    return LayerFactorization(name, None, (), 0.0, count, count, reason)


def _refusal(layer: SelectedLayer, model: nn.Module, readers: Mapping[int, str]) -> str | None:
    """Why a layer cannot be replaced, or None. ``readers`` is `_weight_readers` of the model."""
    module: Any = layer.module
    if module is model:
        return f"expected a layer inside a model, got the model itself, a {type(module).__name__}; use from_dense"
    if parametrize.is_parametrized(module):
        found = sorted(module.parametrizations)
        return f"expected a plain weight, got parametrizations on {found}; finalize_ or remove them"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"expected nn.Linear or nn.Conv2d, got the sub-class {type(module).__name__}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "expected weight to be a Parameter, got a computed one (torch.nn.utils.prune?)"
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, PixelsRead)]
    if module._forward_hooks or before or module._backward_hooks or module._backward_pre_hooks:
        return "expected no hooks, got a layer that carries some, which would be lost"
    if id(module) in readers:
        return f"expected a weight that nothing else reads, but {readers[id(module)]}"
    return unsupported_conv_reason(module) if isinstance(module, nn.Conv2d) else None
