"""Compiles every kernel that the stages of the first call launch, in many processes at once, into Triton's cache.

A kernel takes 0.8 s of one core to compile, and a stage that times kernels should not wait for it a hundred times. A
kernel that cannot be compiled or launched is a row here, with its error.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch
from torch import Tensor

from gpu_check import layers, options, rows
from gpu_check.summary import config_text
from gpu_check.sweep import ways
from slimkernels import ops
from slimkernels.dispatch.select import KernelChoice
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem

Job = tuple[ConvProblem | FusedConvProblem, KernelChoice | None]
# The batch of a training step in ``bench_backward.py``.
TRAINING_BATCH = 512


def jobs(names: Iterable[str], device: str, swept: bool = True, training: bool = False) -> list[Job]:
    """What the rows of these names launch, the sweep and a training step (a job without a choice), each once."""
    found: dict[str, Job] = {}
    for name in names:
        for p in layers.ROWS[name].every(device):
            for choice in layers.choices_of(p) if name == "headline" else [layers.choice_of(p)]:
                found.setdefault(layers.choice_key(p, choice.name, choice.config), (p, choice))
    for name in layers.SWEPT_ROWS if swept else ():
        for p in layers.ROWS[name].every(device):
            for choice in ways(p):
                found.setdefault(layers.choice_key(p, choice.name, choice.config), (p, choice))
    training_step = replace(layers.HEADLINE, batch=TRAINING_BATCH).problems(device) if training else []
    return list(found.values()) + [(p, None) for p in dict.fromkeys(training_step)]


def train(p: ConvProblem) -> tuple[Tensor, ...]:
    """Forward and all gradients of a layer and of the batch norm that takes its ReLU, as a step under autocast; the
    gradients.
    """
    bench = layers.Bench(replace(p, dtype=torch.float32, epilogue="none"))
    layer, x = bench.layer.train().requires_grad_(True), bench.x.requires_grad_(True)
    with torch.autocast(p.device, torch.bfloat16, enabled=p.device == "cuda"):
        y = layer(x)
    weight = torch.ones(p.c_out, device=p.device, requires_grad=True)
    y = ops.batch_norm(y, weight, torch.zeros_like(weight), epilogue=p.epilogue)
    return torch.autograd.grad(y, [x, weight, *layer.parameters()], torch.randn_like(y))


def run(job: Job) -> tuple[float, str | None]:
    """Seconds of one launch, compilation included, and the error's text if it failed."""
    begun = time.monotonic()
    try:
        if job[1] is None:
            train(job[0])
        else:
            layers.Bench(job[0]).call(job[1])
        if job[0].device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # compilers raise whatever they like; the row says what
        return time.monotonic() - begun, f"{type(error).__name__}: {error}"[:500]
    return time.monotonic() - begun, None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--names", nargs="*", default=list(layers.FIRST_ROWS), help="of gpu_check.layers.ROWS")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the sweep's configurations")
    parser.add_argument("--training", action="store_true", help="the kernels of a training step too")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    begun, failed, longest = time.monotonic(), 0, 0.0
    wanted = jobs(parsed.names, parsed.device, not parsed.no_sweep, parsed.training)
    with ProcessPoolExecutor(parsed.processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, job): job for job in wanted}
        for done in as_completed(running):
            (p, choice), (seconds, error) = running[done], done.result()
            longest = max(longest, seconds)
            if error is not None:
                failed += 1
                how = "training" if choice is None else f"{choice.name} {config_text(choice.config)}"
                name = f"{layers.layer_name(p)} {how}"
                rows.append(parsed.rows, {"suite": "compile", "name": name, "match": False, "error": error})
                print(f"{name}: {error}")
    spent = time.monotonic() - begun
    rows.append(parsed.rows, {"suite": "compile", "name": "all", "match": failed == 0, "kernels": len(wanted),
                              "failed": failed, "seconds": spent, "longest_s": longest})  # fmt: skip
    print(f"{len(wanted)} kernels, {failed} failed, {spent:.1f} s, the longest {longest:.1f} s")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
