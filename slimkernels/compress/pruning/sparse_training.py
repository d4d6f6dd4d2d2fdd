"""Training through the sparse kernels: masked layers whose blocks are few enough run as block-sparse layers meanwhile.

Parameters, masks, optimiser, averages and checkpoints do not notice. The dense weight stays the Parameter; what changes
is the forward of the layer, which takes the blocks that live out of the weight, hands them to the sparse op, and gets
the gradient of these blocks back into the weight's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.compress.pruning.prune import masks
from slimkernels.compress.training.callbacks import Callback
from slimkernels.conversion import measure as stopwatch
from slimkernels.conversion.layers import type_obstacle
from slimkernels.formats import BlockMask, block_grid, expand_mask_blocks, weight_shape_4d
from slimkernels.kernels.transposed import transpose_index
from slimkernels.nn.attributes import resolved_padding
from slimkernels.ops import bsr_conv2d, bsr_linear

_MEASURE_ROUNDS, _MEASURE_BUDGET_S = 5, 0.3


class SparseTraining(Callback):
    """Runs masked layers through the sparse kernels while they train, where forward and backward are faster so.

    From ``begin`` on, when masks are as sparse as they will be, each masked Conv2d and Linear is measured once, at its
    next call, on the very input and under the autocast of the run: forward and backward, dense and sparse. Where sparse
    is at least ``min_speedup`` times as fast the layer runs so until the run is over, however it ends. Outputs and
    gradients are those of the dense layer up to rounding. Evaluation runs dense, and so does what `torch.compile`
    compiles. A mask that changes after all is followed. On CPUs the sparse kernels compute in float32, which seldom
    gains anything over dense layers under autocast to bfloat16.

    What was decided is checkpointed with the run, so that a resumed one decides alike. Steps that were measured with
    other results in another run differ in the last bits, as dense and sparse sums do.

    Args:
        begin: share of the run after which layers are measured, such as the ``end`` of `GradualPruning`.
        min_speedup: what a layer has to gain.

    Attributes:
        speedups: layer -> how much faster sparse was.

    Raises:
        ValueError: not ``0 <= begin < 1`` or ``min_speedup < 0``.

    Example:
        >>> import slimkernels as sk
        >>> callbacks = [sk.GradualPruning(0.95, (16, 1), end=0.5), sk.SparseTraining(begin=0.5)]
    """

    def __init__(self, begin: float = 0.7, *, min_speedup: float = 1.05) -> None:
        if not 0.0 <= begin < 1.0 or min_speedup < 0:
            raise ValueError(
                "SparseTraining: expected 0 <= begin < 1 and min_speedup >= 0, got "
                f"begin={begin}, min_speedup={min_speedup}"
            )
        self.begin, self.min_speedup = begin, min_speedup
        self.speedups: dict[str, float] = {}
        self._running: dict[str, _SparseForward] = {}

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Replaces the forwards of masked layers from ``begin`` on."""
        if step < int(self.begin * total_steps):
            return
        for name, mask in masks(model).items():
            module = model.get_submodule(name)
            if name in self._running or type_obstacle(module) is not None or "forward" in vars(module):
                continue
            self._running[name] = _SparseForward(module, mask, name, self)
            module.forward = self._running[name]  # type: ignore[method-assign]  # until `on_run_end`

    def on_run_end(self, model: nn.Module) -> None:
        """Gives the layers their own forwards back."""
        for name in self._running:
            vars(model.get_submodule(name)).pop("forward", None)
        self._running.clear()

    def variant(self) -> Hashable:
        """Raises ValueError: layers are measured in the middle of a step."""
        raise ValueError("SparseTraining: expected cuda_graph=False, got True; layers are measured in a step")

    def metrics(self) -> dict[str, float]:
        """How many layers run sparse."""
        return {"sparse_layers": float(sum(self.decided(name) is True for name in self._running))}

    def decided(self, name: str) -> bool | None:
        """Whether a layer runs sparse; None before it was measured."""
        return None if name not in self.speedups else self.speedups[name] >= self.min_speedup

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"speedups": dict(self.speedups)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back `state_dict`."""
        self.speedups = {str(name): float(value) for name, value in state["speedups"].items()}


class _SparseForward:
    """The forward of a masked layer, dense or sparse as its `SparseTraining` decides."""

    def __init__(self, module: nn.Module, mask: BlockMask, name: str, decisions: SparseTraining) -> None:
        self.module: Any = module
        self.mask, self.name, self.decisions = mask, name, decisions
        self.shape = weight_shape_4d(mask.weight_shape)
        self.geometry: dict[str, Any] = {}
        if isinstance(module, nn.Conv2d):
            self.geometry = {
                "stride": module.stride,
                "padding": resolved_padding(module),
                "dilation": module.dilation,
            }
        self.op: Any = bsr_conv2d if self.geometry else bsr_linear
        self._seen: tuple[Tensor, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._dense(x)
        sparse = self.decisions.decided(self.name)
        if sparse is None:
            self.decisions.speedups[self.name] = self._speedup(x)
            sparse = self.decisions.decided(self.name)
        return self._sparse(x) if sparse else self._dense(x)

    def _dense(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)

    def _sparse(self, x: Tensor) -> Tensor:
        if self._seen is None or self._seen[0] is not self.mask.mask or self._seen[1] != self.mask.mask._version:
            self._index()
        weight = self.module.parametrizations.weight.original
        for part in self.module.parametrizations.weight:
            if not isinstance(part, BlockMask):  # what the mask hides is not read
                weight = part(weight)
        # Tap-major with the input channels innermost, which is how channels_last weights lie.
        flat = (weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)).reshape(-1)
        values = flat.index_select(0, self.places).view(-1, *self.mask.block_shape)
        if self.inside is not None:
            values = values.masked_fill(~self.inside, 0.0)
        return self.op(
            x,
            values,
            self.crow,
            self.col,
            self.module.bias,
            weight_shape=self.mask.weight_shape,
            block_shape=self.mask.block_shape,
            transposed=self.transposed,
            **self.geometry,
        )

    def _index(self) -> None:
        """What follows from the mask: the pattern, and where its blocks lie in the weight."""
        mask = self.mask.mask
        self._seen = mask, mask._version
        c_out, c_in, r, s = self.shape
        block_out, block_in = self.mask.block_shape
        rows, cols = mask.nonzero(as_tuple=True)
        groups = block_grid(self.shape, self.mask.block_shape)[1] // (r * s)
        self.crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        self.crow[1:] = mask.sum(1).cumsum(0)
        self.col = cols.to(torch.int32)
        settings = (self.geometry.get("stride", (1, 1)), self.geometry.get("dilation", (1, 1)))
        self.transposed = transpose_index(self.crow, self.col, self.shape, self.mask.block_shape, *settings)
        out = rows[:, None] * block_out + torch.arange(block_out, device=mask.device)
        channel = (cols % groups)[:, None] * block_in + torch.arange(block_in, device=mask.device)
        column = (cols // groups)[:, None] * c_in + channel
        places = out[:, :, None] * (r * s * c_in) + column[:, None, :]
        self.inside: Tensor | None = None
        if c_out % block_out or c_in % block_in:
            self.inside = expand_mask_blocks(self.shape, self.mask.block_shape, rows, cols)
            places = places.masked_fill(~self.inside, 0)
        self.places = places.reshape(-1)

    def _speedup(self, x: Tensor) -> float:
        """How much faster forward and backward are sparse, on a copy of this input."""
        image = x.detach().requires_grad_(x.requires_grad)
        original = self.module.parametrizations.weight.original
        inputs = [t for t in (image, original, self.module.bias) if t is not None and t.requires_grad]
        if not inputs:
            return 0.0

        def step(forward: Any) -> None:
            y = forward(image)
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        dense, sparse = stopwatch.typical_seconds(
            [lambda: step(self._dense), lambda: step(self._sparse)],
            device=x.device.type,
            repeats=_MEASURE_ROUNDS,
            budget_s=_MEASURE_BUDGET_S,
        )
        return float(dense) / max(float(sparse), 1e-9)
