"""compute-sanitizer over the headline's kernels and configurations and a training step's, at 8 images: no error is
expected.

Torch's memory pool is off, so that every tensor is an allocation of its own and a read past its end is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from gpu_check import layers, options, rows
from gpu_check.precompile import train
from gpu_check.summary import config_text
from slimkernels.kernels.problems import ConvProblem

IMAGES = 8
TRAINED = ("conv1_2", "conv3_2", "conv5_4")
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "synccheck", "initcheck"))
    parser.add_argument("--target", action="store_true", help="run what is checked")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    if parsed.target:
        target(IMAGES)
        return
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("sanitizer: compute-sanitizer is not on this machine")
    command = ["compute-sanitizer", "--tool", parsed.tool, "--error-exitcode", str(_ERROR_STATUS), sys.executable,
               "-m", "gpu_check.sanitizer", "--target"]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    launched, summary = 0, "no summary"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                launched += line.startswith("launched ")
                summary = line.strip() if "SUMMARY" in line else summary
        except KeyboardInterrupt:
            process.kill()
            summary = "out of time"
    wanted = len(trained()) + sum(len(layers.choices_of(p)) for p in layers.HEADLINE.problems())
    row = {"suite": "sanitizer", "name": parsed.tool, "match": process.returncode == 0 and launched == wanted,
           "kernels": launched, "of": wanted, "summary": summary}  # fmt: skip
    rows.append(parsed.rows, row)
    print(f"{parsed.tool}: {launched} of {wanted} kernels, {summary}")
    if not row["match"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
