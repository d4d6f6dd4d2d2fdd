"""Choice of a kernel: problem -> candidates, each kept or rejected with a reason -> tuned entry or cost -> choice.

An op asks `launcher`; the answer, a launch function with its configuration bound, is remembered for each problem.
Nothing is measured here: `slimkernels tune` measures, and leaves a table that `slimkernels.dispatch.tables` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.dispatch import cpu_cost, fused_cost, gpu_cost, gpu_dense_cost, tables
from slimkernels.kernels import KERNELS, KernelSpec
from slimkernels.kernels.problems import FusedConvProblem, Problem, Request, SizedProblem

_ISA_ORDER = ("scalar", "avx2", "avx512")
_BACKEND_ORDER = ("triton", "cuda", "cpu", "reference")


@dataclass(frozen=True)
class Candidate:
    """A kernel considered for a problem: ``reason`` says why it was rejected (None when kept)."""

    name: str
    reason: str | None
    predicted_s: float


@dataclass(frozen=True)
class KernelChoice:
    """The kernel to run, its launch configuration, and why."""

    name: str
    config: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


def _rejected(spec: KernelSpec, problem: Problem, backend: str, isa_cap: str | None) -> str | None:
    if backend != "auto" and spec.backend != backend:
        return f"backend {backend!r} was asked for"
    if backend == "auto" and spec.backend == "triton" and problem.device == "cpu":
        return "Triton's interpreter runs on explicit request only"
    if spec.isa is not None and isa_cap is not None and _ISA_ORDER.index(spec.isa) > _ISA_ORDER.index(isa_cap):
        return f"SLIMKERNELS_ISA caps the instruction set at {isa_cap}"
    if spec.explicit_only:
        return f"{spec.explicit_only}: it runs on explicit request only"
    return spec.supports(problem) or spec.available()


def _kernels_of(problem: Problem) -> list[KernelSpec]:
    return [spec for spec in KERNELS.values() if spec.op == problem.op]


def _backend(backend: str) -> str:
    if backend not in env.BACKENDS:
        raise ValueError(f"select: expected backend in {', '.join(env.BACKENDS)}, got {backend!r}")
    return env.backend() if backend == "auto" else backend


def candidates(problem: SizedProblem, backend: str = "auto") -> list[Candidate]:
    """Every kernel of the problem's op, kept or rejected with its reason.

    Args:
        problem: what is to be computed.
        backend: ``auto`` (then ``SLIMKERNELS_BACKEND`` may force one), or a backend's name.

    Raises:
        ValueError: unknown backend.
    """
    backend = _backend(backend)
    return [
        Candidate(s.name, _rejected(s, problem, backend, env.isa_cap()), predicted_seconds(s, problem))
        for s in _kernels_of(problem)
    ]


def choose(problem: Problem, backend: str = "auto", index: int = -1) -> KernelChoice:
    """The kernel for a problem, by the tuned table or the cost model where several compete.

    A `Request` (no sizes) gets the kept kernel of the fastest backend: Triton, CUDA C++, CPU (highest instruction set),
    reference. So does a sized problem that leaves one kernel and one configuration: block-sparse kernels always come
    before the reference, which multiplies the zeros, and a higher instruction set before a lower one.

    Args:
        index: of the CUDA device, whose table and ceilings count; -1 is the current one.

    Raises:
        ValueError: no kernel takes the problem on the backend asked for; the message lists every rejection.
    """
    return _choose(problem, _backend(backend), env.isa_cap(), index)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, backend: str, isa_cap: str | None, index: int) -> KernelChoice:
    def rank(spec: KernelSpec) -> tuple[int, int]:
        return _BACKEND_ORDER.index(spec.backend), -_ISA_ORDER.index(spec.isa) if spec.isa else 0

    passed_over: list[str] = []
    kept: list[KernelSpec] = []
    for spec in sorted(_kernels_of(problem), key=rank):
        reason = _rejected(spec, problem, backend, isa_cap)
        if reason is None:
            kept.append(spec)
        elif not kept:
            passed_over.append(f"{spec.name}: {reason}")
    if not kept:
        raise ValueError(f"{problem.op}: no kernel takes this problem ({'; '.join(passed_over)})")
    first = KernelChoice(kept[0].name, {}, "; ".join(passed_over) or "first choice")
    return first if isinstance(problem, Request) else _compared(problem, _contenders(kept), first, index)


def _contenders(kept: list[KernelSpec]) -> list[KernelSpec]:
    """Of the kept kernels, best backend first, those that may be the fastest."""
    isa = next((s.isa for s in kept if s.isa is not None), None)
    # A native kernel goes before the reference: that multiplies zeros, or runs low-rank factors by torch's layers,
    # which lost on every convolution of a low-rank VGG-19 at batch 1 and won on one of ten shapes at batch 16.
    sparse = kept[0].op.startswith("bsr") or kept[0].isa is not None
    return [
        s
        for s in kept
        if (s.isa is not None and s.isa == isa)
        or (s.isa is None and (s is kept[0] or s.backend != "reference" or not sparse))
    ]


def _compared(problem: SizedProblem, specs: list[KernelSpec], first: KernelChoice, index: int) -> KernelChoice:
    ways = list(configurations(problem, specs))
    if len(ways) == 1:
        return KernelChoice(first.name, ways[0][1], first.reason)
    found = tables.nearest(problem, index)
    if found is not None:
        entry, away = found
        config = dict(entry.config)
        if any(spec.name == entry.kernel and (config in (dict(c), {})) for spec, c in ways):
            how = "tuned on this shape" if away == 0 else f"tuned on a shape {away:.1f} doublings away"
            return KernelChoice(entry.kernel, config, f"{how}: {1e6 * entry.seconds:.3g} us")
    times = [(predicted_seconds(spec, problem, config, index), i) for i, (spec, config) in enumerate(ways)]
    (best, i), *others = sorted(times)
    text = f"cost model: {1e6 * best:.3g} us"
    other = next((t for t, j in others if ways[j][0] is not ways[i][0]), None)
    text += "" if other is None else f", the next kernel {1e6 * other:.3g} us"
    return KernelChoice(ways[i][0].name, ways[i][1], text)


def configurations(
    problem: SizedProblem, specs: list[KernelSpec] | None = None, backend: str = "auto"
) -> Iterator[tuple[KernelSpec, dict[str, int]]]:
    """Every kept kernel of a problem with every launch configuration: what a choice is made from, and `tune` times.

    Args:
        specs: the kernels; by default all that are kept and may be the fastest.

    Raises:
        ValueError: no kernel takes the problem.
    """
    if specs is None:
        rejections = {s.name: _rejected(s, problem, _backend(backend), env.isa_cap()) for s in _kernels_of(problem)}
        kept = [s for s in _kernels_of(problem) if rejections[s.name] is None]
        if not kept:
            raise ValueError(f"{problem.op}: no kernel takes this problem ({rejections})")
        kept.sort(key=lambda s: (_BACKEND_ORDER.index(s.backend), -_ISA_ORDER.index(s.isa) if s.isa else 0))
        specs = _contenders(kept)
    for spec in specs:
        for config in spec.configs(problem):
            yield spec, dict(config)


def resolve(kernel: str, request: Request) -> KernelSpec:
    """The KernelSpec that a call without sizes would run: an explicit name as it is, or the choice for ``auto``.

    Raises:
        ValueError: unknown name, or an explicit kernel that cannot run; explicit requests never fall back.
    """
    if kernel == "auto":
        return KERNELS[_choose(request, env.backend(), env.isa_cap(), -1).name]
    spec = _explicit(kernel, request)
    reason = spec.precision_reason(request)  # not remembered: torch's switches change
    if reason is not None:
        raise ValueError(_cannot_run(kernel, request, reason))
    return spec


def takes(kernel: str, request: Request) -> bool:
    """Whether an explicit kernel runs here and takes such calls, now or once torch's switches of precision let it."""
    spec = KERNELS.get(kernel)
    return spec is not None and (spec.takes(request) or spec.available()) is None


def launcher(kernel: str, index: int, problem_type: type[SizedProblem], *sizes: Any) -> Callable[..., Tensor]:
    """The launch function that an op call runs, its configuration bound; remembered per arguments.

    Args:
        kernel: an explicit name, which keeps its name and gets the best of its configurations, or ``auto``.
        index: of x's CUDA device, -1 on the CPU (``x.get_device()``).
        problem_type: the class of the problem.
        sizes: the fields of the problem, which comes in parts because a cache looks up a tuple faster than a dataclass.

    Raises:
        ValueError: unknown name, or an explicit kernel that cannot run; explicit requests never fall back.
    """
    if _FORCED:
        return _bound(_FORCED[-1])
    # For mypy: a problem's class is hashable, as the cache wants it.
    return _launcher(kernel, env.backend(), env.isa_cap(), index, problem_type, sizes)  # type: ignore[arg-type]


_FORCED: list[KernelChoice] = []


@contextmanager
def forced(choice: KernelChoice) -> Iterator[None]:
    """Every op call inside, of whatever problem, runs this choice: for measuring one configuration after another."""
    _FORCED.append(choice)
    try:
        yield
    finally:
        _FORCED.pop()


def _bound(choice: KernelChoice) -> Callable[..., Tensor]:
    launch = KERNELS[choice.name].launch
    return partial(launch, config=choice.config) if choice.config else launch


@lru_cache(maxsize=4096)
def _launcher(
    kernel: str, backend: str, isa_cap: str | None, index: int, problem_type: type[SizedProblem], sizes: tuple[Any, ...]
) -> Callable[..., Tensor]:
    problem = problem_type(*sizes)
    if kernel == "auto":
        choice = _choose(problem, backend, isa_cap, index)
    else:
        spec = _explicit(kernel, Request.of(problem))
        choice = _compared(problem, [spec], KernelChoice(kernel), index)
    return _bound(choice)


def forget() -> None:
    """Drops every remembered choice and loaded table: for a table that was written meanwhile."""
    _choose.cache_clear()
    _launcher.cache_clear()
    tables.forget()


_TENSOR_CORES = "__cuda_tensor_cores"


def resolve_gradient(
    kernel: str, request: Request, stride: Sequence[int] = (1, 1), arguments: Sequence[Any] = ()
) -> KernelSpec:
    """The KernelSpec of a gradient op for a layer whose forward runs ``kernel``: of the same backend.

    A Triton or reference forward keeps its backend, a C++ CPU one at most its instruction set. A forward on the tensor
    cores of CUDA C++ has its gradients there where those kernels take them; the rest of CUDA C++ has none, which leaves
    the choice to ``auto``. The CPU's input gradient takes stride 1; the reference has the others.

    Args:
        arguments: those of the launch. The tensor-core kernels are asked whether they take them: the other way round a
            weight may be too large for a thread block, and then ``auto`` has its gradient.

    Raises:
        ValueError: an unknown kernel, or no kernel of that backend takes the gradient.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"{request.op}: expected 'auto' or a listed kernel, got {kernel!r}")
    forward = None if kernel == "auto" else KERNELS[kernel]
    if forward is not None and forward.name.endswith(_TENSOR_CORES):
        same = KERNELS.get(f"{request.op}{_TENSOR_CORES}")
        takes = same is not None and (same.supports(request) or same.available()) is None
        if same is not None and takes and (not arguments or same.obstacle(*arguments) is None):
            return same
    backend = env.backend() if forward is None else forward.backend
    backend = backend if backend in ("triton", "reference") else "auto"
    cap = env.isa_cap() if forward is None or forward.isa is None else forward.isa
    spec = KERNELS[_choose(request, backend, cap, -1).name]
    if spec.op == "bsr_conv2d_dgrad" and spec.backend == "cpu" and max(stride) > 1:
        return KERNELS[f"{spec.op}__reference"]
    return spec


@lru_cache(maxsize=1024)
def _explicit(kernel: str, request: Request) -> KernelSpec:
    spec = KERNELS.get(kernel)
    if spec is None or spec.op != request.op:
        names = ", ".join(s.name for s in _kernels_of(request))
        raise ValueError(f"{request.op}: expected kernel 'auto' or one of {names}, got {kernel!r}")
    reason = spec.supports(request) or spec.available()
    if reason is not None:
        raise ValueError(_cannot_run(kernel, request, reason))
    return spec


def _cannot_run(kernel: str, request: Request, reason: str) -> str:
    return f"{request.op}: kernel {kernel!r} cannot run here: {reason}"


def machine_isa() -> str:
    """The highest instruction set whose native kernels run here; ``scalar`` when there are none."""
    for isa in reversed(_ISA_ORDER):
        if KERNELS[f"bsr_conv2d_f32__{isa}"].available() is None:
            return isa
    return "scalar"


def predicted_seconds(
    spec: KernelSpec, problem: SizedProblem, config: Mapping[str, int] | None = None, index: int = -1
) -> float:
    """Predicted time of a kernel on a problem, only ever compared with other predictions."""
    if problem.device == "cpu":
        threads = torch.get_num_threads()
        if spec.backend == "reference" or spec.isa is None:
            return cpu_cost.cpu_reference_seconds(problem, tables.cpu_rates(machine_isa()), threads)
        return cpu_cost.cpu_seconds(problem, tables.cpu_rates(spec.isa), threads)
    rates = tables.gpu_rates(index)
    if isinstance(problem, FusedConvProblem):
        return fused_cost.predict_fused(spec.backend, problem, config or {}, rates).seconds
    return gpu_cost.predict_gpu(
        spec.backend,
        problem,
        config or {},
        rates,
        one_position=spec.one_position,
        tensor_cores=spec.on_tensor_cores(problem),
    ).seconds


def predicted_dense_seconds(problem: SizedProblem, index: int = -1) -> float:
    """Predicted time of the dense layer (torch's own) that a problem replaces."""
    if problem.device == "cpu":
        return cpu_cost.cpu_dense_seconds(problem, tables.cpu_rates(machine_isa()), torch.get_num_threads())
    if isinstance(problem, FusedConvProblem):
        return fused_cost.predict_fused("reference", problem, {}, tables.gpu_rates(index)).seconds
    return gpu_dense_cost.gpu_dense(problem, tables.gpu_rates(index)).seconds
