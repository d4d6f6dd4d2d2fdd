"""Trained compact files: bytes as this machine stores them, and speed against the dense network.

The files are those of a committed report of the recipe (``results/*/slimnets-*/checkpoints``), trained and rounded to
four bits on a GPU. Each is loaded, made dense, converted for this machine and one batch size, on a CPU saved again in
four bits (rounding what lies on that grid changes no weight), and timed as a recording of `slimkernels.graphed`, on a
GPU with the copies of its inputs and outputs. Dense is the fastest of the engines here on the same network, its zeros
stored.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import slimkernels as sk
from slimkernels import timing
from slimkernels.cli import bench
from slimkernels.cli.peers import cpu_peers

RESULTS = Path(__file__).parent / "results"
FILES = sorted(RESULTS.glob("*/slimnets-*/checkpoints/*.slim.safetensors"))
# VGG-19 in float32 with its batch norms, as plain safetensors.
DENSE_BYTES = 82_317_760
BATCHES = {"cpu": (1, 64), "cuda": (1, 1024)}


# Images on which outputs are compared in float64; of a handful the errors' ratio is mostly chance.
COMPARED = 64


def for_a_gpu(file: Path) -> bool:
    """Whether a file is of the recipe for GPUs, and its blocks are such that one multiplies them."""
    block = re.search(r"-(\d+)x(\d+)-", file.name)
    return "nvidia" in str(file.relative_to(RESULTS)) and block is not None and int(block[2]) >= 16


def cases() -> list[Any]:
    """Every file on a CPU; on a GPU those of recipes whose blocks a GPU multiplies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [file for file in FILES if device == "cpu" or for_a_gpu(file)]
    return [
        pytest.param(file, batch, id=f"{file.name.removesuffix('.slim.safetensors')}-batch{batch}")
        for file in files
        for batch in BATCHES[device]
    ]


@lru_cache(maxsize=1)
def dense_model(file: Path) -> Any:
    """The network of a file in float32, its zeros stored."""
    return sk.to_dense(sk.load(file)).float().eval()


@pytest.mark.parametrize(("file", "batch"), cases())
def test_checkpoint(race: Any, smoke: bool, device: str, tmp_path: Path, file: Path, batch: int) -> None:
    if smoke and (file != FILES[0] or batch != 1):
        pytest.skip("not in the smoke run")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count = max(batch, 1 if smoke else COMPARED)
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    x, dense = images[:batch], copy.deepcopy(dense_model(file)).to(device, dtype)
    fast = sk.convert(dense, example_inputs=(x,), policy=sk.Policy(measure=not smoke, serve=sk.graphed))
    saved = file
    if device == "cpu":  # a GPU's machine spends half of its time on it
        saved = tmp_path / "again.slim.safetensors"
        sk.save(fast, saved, values="int4")
    torch.backends.cudnn.benchmark = False  # it would try every algorithm on float64
    ratio = bench.error_ratio(dense, peers.in_batches(fast, batch), images, device)
    torch.backends.cudnn.benchmark = device == "cuda"
    assert ratio <= (4 if smoke else 2), f"error against float64 is {ratio:.2f} times that of the dense network"
    recorded = sk.graphed(fast, x)
    if device == "cpu":
        baselines = timing.best_dense(dense, x, compile=not smoke) | ({} if smoke else cpu_peers(dense, x, print))
        timings = race.run(lambda: recorded(x), baselines, beside={"converted": lambda: fast(x)})
    else:
        baselines = peers.gpu_dense(dense, x, print, compile=None)
        timings = race.run(lambda: recorded(x), baselines)
        # On their own: from Python a call at batch 1 takes twenty times as long as its kernels.
        timings |= timing.interleaved({"converted": lambda: fast(x)}, seconds=0.05)
        race.benchmark.extra_info.update(graph_ms=peers.graph_ms(recorded), **peers.decisions(fast, recorded))
    ours, called, best = timings["contender"], timings["converted"], timings["best"]
    race.benchmark.extra_info.update(
        suite="checkpoints", file=str(file.relative_to(RESULTS)), batch=batch, match=True, error_ratio=ratio,
        bytes=saved.stat().st_size, bytes_trained=file.stat().st_size, compression=DENSE_BYTES / saved.stat().st_size,
        swapped=len(fast.slimkernels_plan.swapped), **ours.as_ms(), converted_p50_ms=called.p50 * 1e3,
        dense_p50_ms=best.p50 * 1e3, baselines_p50_ms={name: timings[name].p50 * 1e3 for name in baselines},
        speedup=best.p50 / ours.p50, threads=torch.get_num_threads(),
    )  # fmt: skip
