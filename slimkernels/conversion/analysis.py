"""What a model holds: per layer its shapes, zero blocks, rank, multiply-adds and bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import env
from slimkernels.conversion.calls import Call, capture
from slimkernels.conversion.factor_chains import FactorChain, find_chains
from slimkernels.conversion.graph import input_sets, parametrized_type, trace, unique_names
from slimkernels.conversion.layers import (
    DROP_IN_LAYERS,
    LOW_RANK_LAYERS,
    WEIGHT_LAYERS,
    LayerWeight,
    Pair,
    declared_block_shape,
    layer_weight,
    structure_obstacle,
    type_obstacle,
    weight_obstacle,
)
from slimkernels.conversion.readers import weight_readers
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.dispatch.select import candidates, choose, predicted_dense_seconds, predicted_seconds
from slimkernels.dispatch.tables import layer_curves
from slimkernels.formats import block_grid, weight_shape_4d
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem, LinearProblem

CANDIDATE_BLOCK_SHAPES: tuple[Pair, ...] = (
    (128, 16),
    (64, 16),
    (64, 64),
    (32, 32),
    (32, 16),
    (16, 16),
    (32, 4),
    (16, 4),
    (32, 1),
    (16, 1),
    (8, 1),
    (4, 1),
    (1, 1),
)
# Sizes at which a layer is judged without example inputs: (images, height = width), and rows of a linear layer.
SHAPELESS_IMAGES = ((1, 2), (1, 8), (1, 32), (16, 4), (16, 16), (128, 2), (128, 8), (16, 56))
SHAPELESS_ROWS = (1, 16, 128, 1024)


@dataclass(frozen=True)
class PatternStats:
    """A weight stored in blocks of one shape.

    Attributes:
        block_shape: ``(block_out, block_in)``.
        nnz_blocks: number of blocks that hold a non-zero.
        blocks: number of all blocks.
        nbytes: values and indices as stored.
        kernel: the kernel that would run, None where only the reference takes this block shape; ``reason`` says why.
        predicted_s: predicted time of the stored work at each size, seconds.
        dense_s: predicted time of the dense layer at each size.
    """

    block_shape: Pair
    nnz_blocks: int
    blocks: int
    nbytes: int
    kernel: str | None
    reason: str
    predicted_s: tuple[float, ...]
    dense_s: tuple[float, ...]

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks that is not stored."""
        return 1.0 - self.nnz_blocks / self.blocks


@dataclass(frozen=True)
class LayerStats:
    """One layer with a weight.

    Attributes:
        name: where the layer is in the model.
        type: its class, without parametrizations.
        weight_shape: None where the layer has no readable weight.
        obstacle: why conversion cannot take the layer; None when it can.
        sparsity: share of weights that are exactly 0 (-0 too; NaN is not).
        declared: block shape declared by a mask or a block-sparse module.
        patterns: candidate block shapes, the fastest by prediction first.
        ranks: inner sizes of a low-rank layer.
        calls: per example input, every call of the layer, those with an empty batch left out.
        macs: multiply-adds of the dense layer over all calls of the first example input, padding included.
        bytes_dense: of the dense weight.
        bytes_stored: of what is or would be stored, values and indices.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...] | None
    obstacle: str | None
    sparsity: float
    declared: Pair | None
    patterns: tuple[PatternStats, ...]
    ranks: tuple[int, ...]
    calls: tuple[tuple[Call, ...], ...]
    macs: int | None
    bytes_dense: int
    bytes_stored: int


@dataclass(frozen=True)
class ModelStats:
    """Every layer with a weight, chains of thin layers, and why the model could not be traced (None when it was)."""

    layers: tuple[LayerStats, ...]
    chains: tuple[FactorChain, ...]
    untraceable: str | None

    def __getitem__(self, name: str) -> LayerStats:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, torch.dtype) else value

        layers = [dataclasses.asdict(layer) for layer in self.layers]
        for layer in layers:
            layer["calls"] = [[{k: plain(v) for k, v in call.items()} for call in calls] for calls in layer["calls"]]
        chains = [{"kind": chain.kind, "names": list(chain.names), "ranks": list(chain.ranks)} for chain in self.chains]
        return {"layers": layers, "chains": chains, "untraceable": self.untraceable}


def analyze(model: nn.Module, example_inputs: Any = None) -> ModelStats:
    """Looks at every Conv, Linear, block-sparse and low-rank layer of a model, which stays untouched.

    Args:
        model: any module; masks and parametrizations are applied to the weights looked at.
        example_inputs: see `slimkernels.conversion.graph.input_sets`; None leaves out call shapes and multiply-adds.

    Raises:
        ValueError: the model does not run on the example inputs. TypeError: example inputs of another form.
    """
    model = unwrapped("analyze", model)
    sets = input_sets(example_inputs)
    graph = trace(model)
    names = weight_layer_names(model)
    recorded = capture(model, sets, names, op="analyze")
    uniques, readers = unique_names(model), weight_readers(model, [graph], recorded.reads if sets else None)
    weights, layers = {}, []
    for name in names:
        module = model.get_submodule(name)
        obstacle, weight = obstacle_or_weight(module, name, uniques, readers)
        if weight is not None and obstacle is None and name in uniques:
            weights[name] = weight
        layers.append(_layer_stats(name, module, obstacle, weight, recorded.calls.get(name, ())))
    return ModelStats(tuple(layers), tuple(find_chains(graph, weights)), graph.reason)


def obstacle_or_weight(
    module: nn.Module, name: str, uniques: Mapping[str, nn.Module], readers: Mapping[str, str]
) -> tuple[str | None, LayerWeight | None]:
    """Why conversion cannot take a layer (None when it can), and its weight where there is one to read.

    ``uniques`` and ``readers`` are those of `slimkernels.conversion.layers.structure_obstacle`.
    """
    obstacle = type_obstacle(module)
    if obstacle is not None:
        return obstacle, None
    tensors = [p for p in module.parameters() if p.dim() > 1]
    for tensor in tensors:
        obstacle = obstacle or weight_obstacle(tensor)
    if obstacle is not None:
        return obstacle, None
    return structure_obstacle(name, uniques, readers), layer_weight(module)


def weight_layer_names(model: nn.Module) -> list[str]:
    """Names of the layers that analysis lists, in the order of ``named_modules``."""
    kinds = (*WEIGHT_LAYERS, *DROP_IN_LAYERS)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _layer_stats(
    name: str, module: nn.Module, obstacle: str | None, weight: LayerWeight | None, calls: Sequence[Sequence[Call]]
) -> LayerStats:
    kind = parametrized_type(module).__name__
    stored = sum(t.numel() * t.element_size() for t in tensors_of(module) if t.dim() > 1 or t.dtype == torch.int32)
    if weight is None:
        own = next((p for p in module.parameters(recurse=False) if p.dim() > 1 and not _uninitialized(p)), None)
        shape = None if own is None else tuple(own.shape)
        return LayerStats(
            name, kind, shape, obstacle, 0.0, None, (), (), tuple(map(tuple, calls)), None, stored, stored
        )
    patterns: tuple[PatternStats, ...] = ()
    if not isinstance(module, LOW_RANK_LAYERS):
        patterns = tuple(rank_patterns(weight, [c.input_shape for c in calls[0]] if calls else None))
        stored = min((p.nbytes for p in patterns[:1] if p.kernel is not None), default=weight.nbytes)
    macs = None
    if calls:
        macs = sum(math.prod(c.output_shape) * (weight.weight.numel() // weight.weight.shape[0]) for c in calls[0])
    ranks = getattr(module, "ranks", None) or ([module.rank] if hasattr(module, "rank") else [])
    return LayerStats(
        name,
        kind,
        tuple(weight.weight.shape),
        obstacle,
        zero_share(weight.weight),
        declared_block_shape(module),
        patterns,
        tuple(ranks),
        tuple(map(tuple, calls)),
        macs,
        weight.nbytes,
        min(stored, weight.nbytes),
    )


def _uninitialized(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.UninitializedParameter)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module that hold values."""
    return [t for t in (*module.parameters(), *module.buffers()) if not _uninitialized(t)]


def zero_share(weight: Tensor) -> float:
    """Share of the entries that are exactly 0."""
    return float((weight == 0).sum()) / max(weight.numel(), 1)


def count_blocks(weight: Tensor, block_shape: Pair) -> int:
    """Number of blocks that hold a non-zero: the sum of `slimkernels.formats.block_mask`, in less memory."""
    c_out, c_in, r, s = weight_shape_4d(weight.shape)
    block_out, block_in = block_shape
    nonzero = (weight.detach() != 0).reshape(c_out, c_in, r * s)
    pad_in, pad_out = -c_in % block_in, -c_out % block_out
    if pad_in or pad_out:
        nonzero = torch.nn.functional.pad(nonzero, (0, 0, 0, pad_in, 0, pad_out))
    nonzero = nonzero.reshape(nonzero.shape[0] // block_out, block_out, -1, block_in, r * s)
    return int(nonzero.any(dim=1).any(dim=2).sum())


def problems(
    weight: LayerWeight, pattern: tuple[Pair, int], input_shapes: Sequence[Sequence[int]] | None, epilogue: str = "none"
) -> list[ConvProblem | LinearProblem]:
    """The problem of a block-sparse layer at each input shape, by default at a list of common sizes.

    Args:
        weight: the dense weight.
        pattern: ``(block_shape, nnz_blocks)``.
        input_shapes: ``(N, C, H, W)`` or ``(C, H, W)`` for a convolution, ``(..., in)`` for a linear layer.
    """
    block_shape, nnz = pattern
    dtype, device = weight.weight.dtype, weight.weight.device.type
    if not weight.is_conv:
        rows = SHAPELESS_ROWS if input_shapes is None else [math.prod(shape[:-1]) for shape in input_shapes]
        out, features = weight.weight.shape
        return [LinearProblem(m, features, out, block_shape, nnz, dtype, device, epilogue) for m in rows]
    c_out, c_in, r, s = weight.weight.shape
    images = [(n, size, size) for n, size in SHAPELESS_IMAGES]
    if input_shapes is not None:
        images = [(math.prod(shape[:-3]), shape[-2], shape[-1]) for shape in input_shapes]
    smallest = [
        max(weight.dilation[i] * (k - 1) + 1 - 2 * weight.padding[i], 1) + (epilogue == "relu_maxpool2")
        for i, k in enumerate((r, s))
    ]
    return [
        ConvProblem(
            n,
            c_in,
            max(h, smallest[0]),
            max(w, smallest[1]),
            c_out,
            r,
            s,
            weight.stride,
            weight.padding,
            weight.dilation,
            block_shape,
            nnz,
            dtype,
            device,
            epilogue,
        )
        for n, h, w in images
    ]


def fused_problems(weight: LayerWeight, sizes: Sequence[Sequence[int]] | None, epilogue: str) -> list[FusedConvProblem]:
    """The problem of a dense convolution with its epilogue at each input shape; as `problems` of a block-sparse one."""
    return [
        FusedConvProblem(
            p.n, p.c_in, p.h, p.w, p.c_out, p.r, p.s, p.stride, p.padding, p.dilation, p.dtype, p.device, epilogue
        )
        for p in problems(weight, ((1, 1), 0), sizes, epilogue)
        if isinstance(p, ConvProblem)
    ]


def usable_kernel(problem: ConvProblem | LinearProblem, backend: str = "auto") -> tuple[str | None, str]:
    """``(kernel, "")``, or ``(None, why)`` where only the reference, unasked for, takes the problem."""
    asked = env.backend() if backend == "auto" else backend
    try:
        choice = choose(problem, backend)
    except ValueError as error:
        return None, str(error)
    if KERNELS[choice.name].backend != "reference" or asked == "reference":
        return choice.name, ""
    why = dict.fromkeys(
        c.reason
        for c in candidates(problem, backend)
        if c.reason is not None and problem.device in KERNELS[c.name].devices and KERNELS[c.name].backend != "triton"
    )
    return None, "no kernel takes it: " + ("; ".join(why) or f"none runs on {problem.device}")


def rank_patterns(
    weight: LayerWeight,
    input_shapes: Sequence[Sequence[int]] | None,
    *,
    block_shapes: Sequence[Pair] = CANDIDATE_BLOCK_SHAPES,
    backend: str = "auto",
    epilogue: str = "none",
) -> list[PatternStats]:
    """Candidate block shapes of a weight, fastest first by prediction, then least stored, ties to the larger block.

    A declared block shape is the only candidate. Shapes that no kernel takes come last, with the reason.
    """
    found = []
    shapes = (weight.block_shape,) if weight.block_shape is not None else tuple(block_shapes)
    full = bool((weight.weight != 0).all())
    for block_shape in shapes:
        grid = block_grid(weight.weight.shape, block_shape)
        nnz = grid[0] * grid[1] if full else count_blocks(weight.weight, block_shape)
        sizes = problems(weight, (block_shape, nnz), input_shapes, epilogue)
        kernel, reason = usable_kernel(sizes[0], backend)
        predicted = tuple(predicted_seconds(KERNELS[kernel], p) for p in sizes) if kernel is not None else ()
        nbytes = nnz * (math.prod(block_shape) * weight.weight.element_size() + 4) + 4 * (grid[0] + 1)
        dense = tuple(predicted_dense_seconds(p) for p in sizes)
        tuned = None if input_shapes is not None or kernel is None else _tuned(weight, block_shape, kernel, nnz)
        if tuned is not None:
            predicted, dense = tuned
        found.append(PatternStats(block_shape, nnz, grid[0] * grid[1], nbytes, kernel, reason, predicted, dense))

    def order(p: PatternStats) -> tuple[bool, float, int, int]:
        area = math.prod(p.block_shape)
        return p.kernel is None, sum(p.predicted_s) / sum(p.dense_s), p.nnz_blocks * area, -area

    return sorted(found, key=order)


def _tuned(
    weight: LayerWeight, block_shape: Pair, kernel: str, nnz_blocks: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """``(sparse, dense)`` seconds at every size that this device's tuned table holds for a layer like this one.

    None where it holds none, for strided and dilated convolutions, and where kernels of another backend were measured.
    """
    if weight.is_conv and (max(weight.stride) > 1 or max(weight.dilation) > 1):
        return None
    shape = tuple(weight.weight.shape)
    curves = layer_curves(shape, block_shape, weight.weight.dtype, weight.weight.device.type)
    specs, own = [KERNELS[c.kernel] for c in curves if c.kernel in KERNELS], KERNELS[kernel]
    if not curves or len(specs) < len(curves) or any((s.backend, s.isa) != (own.backend, own.isa) for s in specs):
        return None
    rows, columns = block_grid(shape, block_shape)
    sparsity = 1.0 - nnz_blocks / (rows * columns)
    return tuple(c.seconds(sparsity) for c in curves), tuple(c.dense_s for c in curves)
