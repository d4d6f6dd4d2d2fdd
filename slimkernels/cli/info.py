"""What was built here, what this machine can run, and why something is missing: `slimkernels info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from slimkernels import _extension, env
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu.pairs import fast_engines

_PACKAGES = ("torch", "torchvision", "triton", "safetensors", "rich", "typer", "scikit-learn", "matplotlib")
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512vl", "avx512dq", "avx512bw", "avx512_bf16", "amx_bf16")


def report() -> dict[str, Any]:
    """Versions, build, CPU, GPUs and kernels of this installation, as JSON-able values.

    Returns:
        A dict with the keys ``slimkernels`` (version), ``python``, ``platform``, ``packages`` (name -> version or
        None), ``native`` (what was compiled, what of it this CPU runs, what is missing and why), ``cpu``, ``openmp``,
        ``cuda``, ``environment`` and ``kernels`` (name -> None when usable, else the reason).
    """
    return {
        "slimkernels": _version("slimkernels"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "native": _native(),
        "cpu": _cpu(),
        "openmp": _openmp(),
        "cuda": _cuda(),
        "environment": _environment(),
        "kernels": {name: _reason(name) for name in KERNELS},
    }


def render(data: dict[str, Any] | None = None) -> str:
    """`report` as text, one fact a line; missing things carry their reason."""
    data = report() if data is None else data
    native, cpu, openmp, cuda = data["native"], data["cpu"], data["openmp"], data["cuda"]
    lines = [
        f"slimkernels {data['slimkernels'] or '(not installed)'}, Python {data['python']}, {data['platform']}",
        "packages     " + ", ".join(f"{name} {version or 'missing'}" for name, version in data["packages"].items()),
        f"CPU          {cpu['model']}, {cpu['cores']} cores usable, torch uses {cpu['threads']} threads",
        f"             {' '.join(cpu['flags']) or 'no AVX2'}",
    ]
    if native["loaded"]:
        lines.append(
            f"native       built by {native['compiler']} for {', '.join(native['isas'])}; "
            f"this CPU runs {', '.join(native['usable_isas'])}"
        )
        engines = " and ".join(native["bf16_engines"])
        lines.append(f"             bf16 by {engines}" if engines else "             no bf16 faster than float32")
    else:
        lines.append(f"native       missing: {native['reason']}")
    lines += [f"             without {what}: {why}" for what, why in native["missing"].items() if what != "native"]
    state = {True: "one runtime", False: "SEVERAL RUNTIMES, threads will be oversubscribed", None: "none found"}
    lines.append(f"OpenMP       {state[openmp['single']]}: {', '.join(openmp['runtimes']) or '-'}")
    if cuda["built"]:
        lines.append(f"CUDA C++     built with CUDA {cuda['version']} for {cuda['archs']}")
    lines += [f"GPU          {gpu['name']}, sm_{gpu['capability']}, runs {gpu['code']}" for gpu in cuda["gpus"]]
    if cuda["reason"]:
        lines.append(f"CUDA C++     cannot run: {cuda['reason']}")
    lines += [f"environment  {name}={value}" for name, value in data["environment"].items()]
    lines.append("kernels")
    width = max(map(len, data["kernels"]))
    lines += [f"  {name:<{width}}  {why or 'usable'}" for name, why in data["kernels"].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    module, reason = _extension.load()
    build = module.build_info() if module is not None else {}
    return {
        "loaded": module is not None,
        "reason": reason,
        "compiler": build.get("compiler"),
        "isas": build.get("isas", []),
        "usable_isas": module.isas() if module is not None else [],
        "bf16_engines": list(fast_engines()),
        "missing": _extension.missing(),
    }


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                elif key.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass  # not Linux: the model is what Python knows
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _openmp() -> dict[str, Any]:
    _extension.load()
    runtimes = _extension.openmp_runtimes()
    return {"runtimes": runtimes, "single": len(runtimes) == 1 if runtimes else None}


def _cuda() -> dict[str, Any]:
    from slimkernels.kernels import cuda

    module = _extension.load()[0]
    build = module.build_info() if module is not None else {}
    number = build.get("cuda_version")
    gpus = []
    if torch.cuda.is_available():
        archs = build.get("cuda_archs", "").split()
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            gpus.append(
                {
                    "name": torch.cuda.get_device_name(i),
                    "capability": f"{major}{minor}",
                    "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
                    "code": _code_for(major, minor, archs),
                }
            )
    return {
        "built": bool(build.get("cuda")),
        "version": f"{number // 1000}.{number % 1000 // 10}" if number else None,
        "archs": build.get("cuda_archs") or None,
        "torch_cuda": torch.version.cuda,
        "reason": cuda.available(),
        "gpus": gpus,
    }


def _code_for(major: int, minor: int, archs: list[str]) -> str:
    """What of this build a GPU executes: a cubin of its generation, or the PTX compiled when it is loaded."""
    for arch in archs:
        number = arch.removeprefix("sm_")
        if arch.startswith("sm_") and (
            number == f"{major}{minor}a"
            or (number.isdigit() and int(number) // 10 == major and int(number) % 10 <= minor)
        ):
            return arch
    if "compute_80" in archs and major >= 8:
        return "compute_80 PTX, compiled when it is first loaded: no cubin for this GPU"
    return "no CUDA C++ kernel" + (": below sm_80" if archs else "")


def _environment() -> dict[str, str]:
    values = {}
    for name, read in (
        ("SLIMKERNELS_BACKEND", env.backend),
        ("SLIMKERNELS_ISA", env.isa_cap),
        ("SLIMKERNELS_CACHE_DIR", env.cache_dir),
        ("TRITON_INTERPRET", env.triton_interpret),
    ):
        try:
            values[name] = str(read())
        except ValueError as error:
            values[name] = f"INVALID ({error})"
    return values


def _reason(name: str) -> str | None:
    try:
        return KERNELS[name].available()
    except Exception as error:
        # A backend that cannot even say why it is missing is what this report is for.
        return f"{type(error).__name__}: {error}"
