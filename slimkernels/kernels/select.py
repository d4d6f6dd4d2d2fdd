"""Choice of a kernel: problem -> candidates, each kept or rejected with a reason -> predicted time -> choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from slimkernels import env
from slimkernels.kernels import KERNELS, KernelSpec
from slimkernels.kernels.problems import ConvProblem, LinearProblem, Problem, Request, SizedProblem

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
    """The kernel to run, its tile parameters, and why."""

    name: str
    config: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def _rejected(spec: KernelSpec, problem: Problem, backend: str, isa_cap: str | None) -> str | None:
    if backend != "auto" and spec.backend != backend:
        return f"backend {backend!r} was asked for"
    if backend == "auto" and spec.backend == "triton" and problem.device == "cpu":
        return "Triton's interpreter runs on explicit request only"
    if spec.isa is not None and isa_cap is not None and _ISA_ORDER.index(spec.isa) > _ISA_ORDER.index(isa_cap):
        return f"SLIMKERNELS_ISA caps the instruction set at {isa_cap}"
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


def choose(problem: Problem, backend: str = "auto") -> KernelChoice:
    """The kept kernel of the fastest backend: Triton, CUDA C++, CPU (highest instruction set), reference.

    Raises:
        ValueError: no kernel takes the problem on the backend asked for; the message lists every rejection.
    """
    return _choose(Request(problem.op, problem.dtype, problem.device, problem.block_shape, problem.epilogue),
                   _backend(backend), env.isa_cap())  # fmt: skip


@lru_cache(maxsize=1024)
def _choose(request: Request, backend: str, isa_cap: str | None) -> KernelChoice:
    def rank(spec: KernelSpec) -> tuple[int, int]:
        return _BACKEND_ORDER.index(spec.backend), -_ISA_ORDER.index(spec.isa) if spec.isa else 0

    passed_over: list[str] = []
    for spec in sorted(_kernels_of(request), key=rank):
        reason = _rejected(spec, request, backend, isa_cap)
        if reason is None:
            return KernelChoice(spec.name, {}, "; ".join(passed_over) or "first choice")
        passed_over.append(f"{spec.name}: {reason}")
    raise ValueError(f"{request.op}: no kernel takes this problem ({'; '.join(passed_over)})")


def resolve(kernel: str, request: Request) -> KernelSpec:
    """The KernelSpec that an op call runs: an explicit name as it is, or the choice for ``auto``.

    Raises:
        ValueError: unknown name, or an explicit kernel that cannot run; explicit requests never fall back.
    """
    if kernel == "auto":
        return KERNELS[_choose(request, env.backend(), env.isa_cap()).name]
    return _explicit(kernel, request)


@lru_cache(maxsize=1024)
def _explicit(kernel: str, request: Request) -> KernelSpec:
    spec = KERNELS.get(kernel)
    if spec is None or spec.op != request.op:
        names = ", ".join(s.name for s in _kernels_of(request))
        raise ValueError(f"{request.op}: expected kernel 'auto' or one of {names}, got {kernel!r}")
    reason = spec.supports(request) or spec.available()
    if reason is not None:
        raise ValueError(f"{request.op}: kernel {kernel!r} cannot run here: {reason}")
    return spec


# GFLOP/s per thread (2 per multiply-add), used where nothing was timed. Set by hand, not fitted: avx2 near what Zen 3
# reaches alone on VGG-19's layers; scalar and avx512 are guesses. The GPU's rates are leads, never measured by us.
_DENSE_GFLOPS = {"scalar": 40.0, "avx2": 75.0, "avx512": 95.0}
_SPARSE_GFLOPS = {"scalar": 6.0, "avx2": 70.0, "avx512": 85.0}
_CALL_SECONDS = 8e-6
_GPU_DENSE_TFLOPS, _GPU_L2_TBYTES = 600.0, 5.5


def machine_isa() -> str:
    """The highest instruction set whose native kernels run here; ``scalar`` when there are none."""
    for isa in reversed(_ISA_ORDER):
        if KERNELS[f"bsr_conv2d_f32__{isa}"].available() is None:
            return isa
    return "scalar"


def predicted_seconds(spec: KernelSpec, problem: SizedProblem) -> float:
    """Predicted time of a kernel on a problem; a crude roofline, only ever compared with other predictions.

    On a GPU the gather kernel is bound by L2: ``BM * block_out / (BM + block_out)`` FLOPs a byte with BM = 128 pixels.
    """
    if spec.backend == "reference":
        return predicted_dense_seconds(problem)
    if problem.device == "cpu":
        rate = _SPARSE_GFLOPS[spec.isa or "scalar"] * 1e9 * torch.get_num_threads()
        if isinstance(problem, ConvProblem | LinearProblem) and strip_is_half(spec, problem):
            rate *= 0.75
        return 2 * problem.macs / rate + _CALL_SECONDS
    block_out = problem.block_shape[0] if isinstance(problem, ConvProblem | LinearProblem) else 128
    intensity = 128 * block_out / (128 + block_out)
    return 2 * problem.macs / (min(_GPU_DENSE_TFLOPS, intensity * _GPU_L2_TBYTES) * 1e12) + _CALL_SECONDS


def strip_is_half(spec: KernelSpec, problem: ConvProblem | LinearProblem) -> bool:
    """Whether the block shape leaves strips of 8 channels: half a register on AVX-512, fewer FMAs a load on AVX2."""
    return spec.isa is not None and problem.block_shape[0] % 16 != 0


def predicted_dense_seconds(problem: SizedProblem) -> float:
    """Predicted time of the dense layer (torch's own) that a problem replaces."""
    if problem.device == "cpu":
        rate = _DENSE_GFLOPS[machine_isa()] * 1e9 * torch.get_num_threads()
        return 2 * problem.macs_dense / rate + _CALL_SECONDS
    return 2 * problem.macs_dense / (_GPU_DENSE_TFLOPS * 1e12) + _CALL_SECONDS
