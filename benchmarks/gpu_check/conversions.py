"""What `convert` launches on a GPU for the stages ``networks`` and ``checkpoints``: every candidate of every layer.

It times up to four ways to run a layer, each a kernel that would be compiled first. Nothing runs here but one image
through each network, for the sizes of its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from slimkernels.conversion import candidates
from slimkernels.conversion.analysis import fused_problems, problems
from slimkernels.conversion.candidates import Unit
from slimkernels.conversion.graph import input_sets
from slimkernels.conversion.plan import Policy
from slimkernels.conversion.units import survey
from slimkernels.kernels.problems import SizedProblem


class Converted(NamedTuple):
    """A network's layers as `convert` sees them for one image, and the batch that it is to be converted for."""

    units: list[Unit]
    batch: int

    def problems(self) -> Iterator[SizedProblem]:
        """Those of the candidates that `convert` would time on the card that torch finds."""
        policy = Policy()
        for unit in self.units:
            sizes = [(self.batch * n, *sizes) for calls in unit.calls for n, *sizes in (c.input_shape for c in calls)]
            if not sizes:
                continue
            options, _ = candidates.block_sparse_options(unit, policy, sizes)
            for option in (*options, *candidates.fused_options(unit, policy, sizes)):
                if option.pattern is None:
                    yield from fused_problems(unit.weight, sizes, option.epilogue)
                else:
                    pattern = option.pattern.block_shape, option.pattern.nnz_blocks
                    yield from problems(unit.weight, pattern, sizes, option.epilogue)


def networks() -> Iterator[tuple[nn.Module, torch.Tensor, int]]:
    """The pruned networks of the stage ``networks`` in float32, an image for each, and its batch size."""
    import bench_networks

    for row in bench_networks.GPU_ROWS:
        model = bench_networks.pruned_model(row.network, row.sparsity, row.block_shape)
        yield model, bench_networks.images(row.network, 1), row.batch


def checkpoints() -> Iterator[tuple[nn.Module, torch.Tensor, int]]:
    """The same of the stage ``checkpoints``; nothing where `constriction`, which reads its files, is not installed."""
    import bench_checkpoints

    try:
        import constriction  # noqa: F401
    except ImportError:
        return
    for file in filter(bench_checkpoints.for_a_gpu, bench_checkpoints.FILES):
        for batch in bench_checkpoints.BATCHES["cuda"]:
            yield bench_checkpoints.dense_model(file), torch.zeros(1, 3, 32, 32), batch


def every(device: str = "cuda") -> Iterator[Converted]:
    """The networks of both stages in bf16."""
    for model, x, batch in (*networks(), *checkpoints()):
        model, x = copy.deepcopy(model).to(device, torch.bfloat16), x.to(device, torch.bfloat16)
        yield Converted(survey(model, input_sets((x,)), Policy(), training=False).units, batch)
