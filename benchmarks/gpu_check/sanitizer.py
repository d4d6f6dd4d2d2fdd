"""compute-sanitizer over the headline's kernels and configurations and a training step's, at 8 images, or over the
kernels of CUDA C++, at two: no error is expected.

Torch's memory pool is off, so that every tensor is an allocation of its own and a read past its end is seen. Several
tools run side by side.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check import chain, layers, options, rows, tensor_cores
from gpu_check.precompile import train
from gpu_check.summary import config_text
from slimkernels.cases import LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.inference.cuda_chain import chain_of
from slimkernels.inference.cuda_linear_chain import linear_chain_of
from slimkernels.kernels.problems import ConvProblem
from slimkernels.nn import LowRankConv2d, LowRankLinear

IMAGES = 8
TRAINED = ("conv1_2", "conv3_2", "conv5_4")
# For the kernels of CUDA C++: large images and a pool, rows whose weights fit, rows of 512 channels that hardly do.
CUDA_IMAGES, RESIDENT, NARROW, CHAINED = 2, ("conv1_2", "conv3_2", "conv4_2", "conv5_4"), "conv3_2", 15
_ERROR_STATUS = 9


def trained() -> list[ConvProblem]:
    """The layers whose gradients are checked: large images, a pool, small images and a pool at the end."""
    return [p for p in layers.HEADLINE.problems() if layers.layer_name(p) in TRAINED]


def target(images: int) -> None:
    """One launch of each layer and choice with the configuration of the full batch, then forward and gradients of
    `trained`, batch norm behind them; each result must be finite.
    """
    for p in layers.HEADLINE.problems():
        bench = layers.Bench(layers.at_batch(p, images))
        for choice in layers.choices_of(p):
            y = bench.call(choice)
            torch.cuda.synchronize()
            print(f"launched {layers.layer_name(p)} {choice.name} {config_text(choice.config)}", flush=True)
            assert bool(torch.isfinite(y).all()), f"{layers.layer_name(p)}: not finite"
    for p in trained():
        assert all(bool(torch.isfinite(gradient).all()) for gradient in train(layers.at_batch(p, images)))
        torch.cuda.synchronize()
        print(f"launched {layers.layer_name(p)} training", flush=True)


def cuda_launches(images: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every kernel of CUDA C++ in the configurations that are timed, and a name for each."""
    resident = [layers.at_batch(p, images) for p in layers.HEADLINE.problems() if layers.layer_name(p) in RESIDENT]
    narrow = [layers.at_batch(p, images) for p in layers.ROWS["blocks_32x32"].problems()]
    narrow = [p for p in narrow if layers.layer_name(p) == NARROW]
    for p in (*resident, *narrow, *(replace(p, dtype=torch.float32) for p in resident[:2])):
        for kernel, config, call in tensor_cores.launches(layers.Bench(p)):
            yield f"{layers.layer_name(p)} {p.dtype} {p.block_shape[0]} {kernel} {config_text(config)}", call
    for kernel, config, call in tensor_cores.Stem(layers.at_batch(layers.HEADLINE.problems()[0], images)).launches():
        yield f"{kernel} {config_text(config)}", call
    for p in resident:
        for kernel, call in tensor_cores.gradient_launches(layers.Bench(p)):
            yield f"{layers.layer_name(p)} {kernel}", call
    modules = [bench.layer.eval() for bench in chain.benches(images, "cuda", CHAINED)]
    x = layers.Bench(layers.at_batch(layers.ROWS["batch_1"].problems()[0], images)).x
    for config in chain.CONFIGURATIONS:
        yield f"{chain.KERNEL} {config_text(config)}", functools.partial(chain_of(modules, **config), x)
    linears = [nn.Linear(512, out, device="cuda", dtype=torch.bfloat16) for out in (512, 10)]
    rows_of_512 = torch.randn(images, 512, device="cuda", dtype=torch.bfloat16)
    yield f"{chain.KERNEL} linear", functools.partial(linear_chain_of(linears), rows_of_512)
    for kernel, m, k, rank in (("low_rank_linear__cuda", 16, 4096, 128), ("low_rank_linear__cuda", 128, 512, 256)):
        case = LowRankLinearCase("sanitizer", m, k, k, rank, epilogue="relu", dtype=torch.bfloat16)
        x, u, v, bias = to_device(case.inputs(), "cuda")
        linear = LowRankLinear.from_factors(u, v, bias, "relu", kernel).eval().requires_grad_(False)
        yield f"{kernel} {m} rows rank {rank}", functools.partial(linear, x)
    size = (images, 256, 8, 8, 256)
    case = LowRankConvCase("sanitizer", "svd", *size, ranks=(128,), epilogue="relu", dtype=torch.bfloat16)
    x, factors, bias = to_device(case.inputs(), "cuda")
    x, factors = channels_last(x), [channels_last(factor) for factor in factors]
    name = "low_rank_conv2d__cuda_tensor_cores"
    conv = LowRankConv2d.from_factors(factors, bias, kind="svd", padding=(1, 1), epilogue="relu", kernel=name)
    yield name, functools.partial(conv.eval().requires_grad_(False), x)


def channels_last(t: Tensor) -> Tensor:
    """As the kernels read it."""
    return t.contiguous(memory_format=torch.channels_last)


def cuda_target(images: int, only: str) -> None:
    """One launch of each of `cuda_launches` with `only` in its name; each result must be finite."""
    torch.backends.cudnn.allow_tf32 = True
    count = 0
    with torch.no_grad():
        for name, call in cuda_launches(images):
            if only not in name:
                continue
            y = call()
            torch.cuda.synchronize()
            assert bool(torch.isfinite(y).all()), f"{name}: not finite"
            print(f"launched {name}", flush=True)
            count += 1
    print(f"all {count} were launched", flush=True)


def checked(tool: str, kernels: str, only: str) -> subprocess.Popen[str]:
    """The sanitizer, begun on this module's target."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(_ERROR_STATUS), sys.executable,
               "-m", "gpu_check.sanitizer", "--target", "--kernels", kernels, "--only", only]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def watch(tool: str, process: subprocess.Popen[str], wanted: int | None) -> dict[str, Any]:
    """What a tool found, once it has ended or the stage is interrupted; its output is printed as it comes.

    Args: wanted: how many launches the target has; None where it counts them itself.
    """
    launched, found, all_of_them = 0, "no summary", wanted
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{tool}: {line}", end="", flush=True)
        launched += line.startswith("launched ")
        if wanted is None and line.startswith("all "):
            all_of_them = int(line.split()[1])
        found = line.strip() if "SUMMARY" in line else found
    if process.wait() < 0:
        found = "out of time"
    return {"suite": "sanitizer", "name": tool, "match": process.returncode == 0 and launched == all_of_them,
            "kernels": launched, "of": all_of_them, "summary": found}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    parser.add_argument("--tool", nargs="+", default=["memcheck"], choices=tools)
    parser.add_argument("--kernels", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--only", default="", help="of the kernels of CUDA C++, launches with this in their name")
    parser.add_argument("--target", action="store_true", help="run what is checked")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    if parsed.target:
        cuda_target(CUDA_IMAGES, parsed.only) if parsed.kernels == "cuda" else target(IMAGES)
        return
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("sanitizer: compute-sanitizer is not on this machine")
    wanted = None
    if parsed.kernels == "triton":
        wanted = len(trained()) + sum(len(layers.choices_of(p)) for p in layers.HEADLINE.problems())
    running = {tool: checked(tool, parsed.kernels, parsed.only) for tool in parsed.tool}
    wrong = []
    with ThreadPoolExecutor(len(running)) as pool:
        watched = {tool: pool.submit(watch, tool, process, wanted) for tool, process in running.items()}
        try:
            wait(watched.values())
        except KeyboardInterrupt:
            for process in running.values():
                process.kill()
    for tool, future in watched.items():
        row = future.result()
        if parsed.kernels == "cuda":
            row["name"] = f"{tool}, CUDA C++"
        rows.append(parsed.rows, row)
        print(f"{row['name']}: {row['kernels']} of {row['of']} kernels, {row['summary']}")
        wrong += [] if row["match"] else [tool]
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
