"""Command-line arguments that the stages share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--rows``, the file for the stage's rows, and ``--device``."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rows", type=Path, default=None, help="append every row to this JSON-lines file")
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal without a GPU")
    return found


def prepare(device: str) -> None:
    """Full float32 precision for references; raises RuntimeError where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("gpu_check: torch sees no CUDA device")
    # These set every part of torch's state; ``fp32_precision`` of one operation leaves one in which torch's compilers
    # raise.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
