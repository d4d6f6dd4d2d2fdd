"""Data-aware factorization: the low-rank weight that changes a layer's outputs least on given data.

With X the rows that reach a layer (of a convolution: its patches), the truncated SVD of ``W S^(1/2)``, S = X^T X, times
``S^(-1/2)``, minimises ``||X (W - W')^T||_F`` at a rank, where the plain SVD minimises ``||W - W'||_F``. Both powers of
S cancel: the minimiser is ``W' = U U^T W`` with U the leading eigenvectors of ``W S W^T``, the second moment of the
layer's outputs without bias, and the squared error is the sum of the dropped eigenvalues. That matrix is ``(out, out)``
where S of a 3x3 convolution has 81 times as many entries as there are pairs of input channels.

The separable and the Tucker-2 form have no such closed form. There the last factor alone is fitted to the outputs by
linear least squares, which cannot make them worse than the plain decomposition does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.factorization.decompositions import float64
from slimkernels.compress.training.evaluation import device_of, mode_of
from slimkernels.kernels.problems import factor_geometry
from slimkernels.nn import LowRankConv2d


def whitened_svd(weight: Tensor, rank: int, output_moment: Tensor) -> tuple[Tensor, Tensor]:
    """``U @ V`` of a rank that has the least squared error of outputs, for inputs with a given second moment.

    The squared error ``||X (W - U V)^T||_F^2`` is the sum of the dropped eigenvalues of ``output_moment``. Directions
    that the data never reach are filled by the plain SVD of what is left of W. Column k of U and row k of V have equal
    norms.

    Args:
        weight: ``(out, in)``, floating point.
        rank: in [1, min(out, in)].
        output_moment: ``W S W^T (out, out)`` with S the second moment of the inputs, see `output_moments`.

    Returns:
        ``U (out, rank)`` and ``V (rank, in)``, detached, in the weight's dtype.

    Raises:
        ValueError: not a finite matrix, a rank out of range, or a moment of another size. TypeError: not floating
            point, or a rank that is no int.
    """
    matrix = float64("whitened_svd", weight, 2)
    moment = float64("whitened_svd", output_moment, 2).to(matrix.device)
    limit = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"whitened_svd: expected rank to be an int, got {rank!r}")
    if not 1 <= rank <= limit:
        raise ValueError(f"whitened_svd: expected rank in [1, {limit}] for a {tuple(matrix.shape)} matrix, got {rank}")
    if tuple(moment.shape) != (len(matrix), len(matrix)):
        raise ValueError(
            f"whitened_svd: expected an output moment {(len(matrix), len(matrix))}, got {tuple(moment.shape)}"
        )
    values, vectors = _eigenpairs(moment)
    reached = int((values > 0).sum())
    u = vectors[:, : min(rank, reached)]
    if reached < rank:
        rest = matrix - u @ (u.t() @ matrix)
        u = torch.cat([u, torch.linalg.svd(rest, full_matrices=False).U[:, : rank - reached]], dim=1)
    v = u.t() @ matrix
    root = torch.linalg.vector_norm(v, dim=1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (u * root).to(weight.dtype), (v / root[:, None]).to(weight.dtype)


def moment_spectrum(output_moment: Tensor) -> Tensor:
    """Eigenvalues of an output moment, falling, in float64; 0 where they are rounding noise. Rank r of `whitened_svd`
    loses the sum of those from r on."""
    return _eigenpairs(output_moment.detach().double())[0]


def _eigenpairs(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((moment + moment.t()) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[0] * len(values) * torch.finfo(torch.float32).eps * 1e-3
    return torch.where(values > noise, values, 0.0), vectors


def output_moments(
    op: str, model: nn.Module, layers: Mapping[str, nn.Module], loader: Iterable[Any], max_batches: int | None = None
) -> dict[str, Tensor]:
    """Second moment ``sum y y^T (out, out)``, float64, of every layer's outputs without bias, over a loader.

    Args:
        op: public function's name, which begins every message.
        model: run in eval mode without gradient; every submodule's mode is restored.
        layers: nn.Linear and nn.Conv2d inside the model, by name.
        loader: batches of images, or sequences that begin with them.
        max_batches: stops after so many.

    Raises:
        ValueError: an empty loader, or a layer that the data do not reach.
    """
    moments: dict[str, Tensor] = {}

    def add(name: str, layer: Any, output: Tensor, x: Tensor) -> None:
        y = output.detach().double()
        dim = 1 if isinstance(layer, nn.Conv2d) else y.dim() - 1
        y = y.movedim(dim, -1 if y.dim() > 1 else 0).reshape(-1, y.shape[dim])
        if layer.bias is not None:
            y = y - layer.bias.detach().double()
        moments[name] = moments[name] + y.t() @ y if name in moments else y.t() @ y

    run_with_outputs(op, model, layers, loader, add, max_batches)
    missing = [name for name in layers if name not in moments]
    if missing:
        raise ValueError(f"{op}: expected the calibration data to reach layer {missing[0]!r}, they do not")
    return moments


def run_with_outputs(
    op: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    loader: Iterable[Any],
    take: Callable[[str, nn.Module, Tensor, Tensor], None],
    max_batches: int | None = None,
) -> None:
    """Runs the model over a loader in eval mode and calls ``take(name, layer, output, input)`` at every layer's call.

    Raises:
        ValueError: an empty loader.
    """

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: take(name, module, output, inputs[0])

    device, done = device_of(model), 0
    with ExitStack() as stack, torch.no_grad(), mode_of(model, training=False):
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook_of(name)).remove)
        for batch in loader:
            if max_batches is not None and done >= max_batches:
                break
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            done += 1
    if done == 0:
        raise ValueError(f"{op}: expected at least one calibration batch, got none")


def refit_last_factors(
    op: str,
    model: nn.Module,
    chains: Mapping[str, tuple[nn.Module, LowRankConv2d]],
    loader: Iterable[Any],
    max_batches: int | None = None,
) -> dict[str, float]:
    """Fits the last factor of every low-rank convolution, in place, to the outputs of the dense one it stands for.

    With P what the last factor reads for one output pixel, ``(columns, pixels)``, and Y the dense outputs without bias,
    H' minimises ``||Y - H' P||^2 + e ||H' - H||^2``, H the factor before, e 1e-9 of the mean eigenvalue of P P^T. The
    error is at most that of H, and directions that no data reach stay as they are.

    Args:
        chains: name -> the dense convolution inside the model, and its twin outside.

    Returns:
        Of every layer ``||Y - H' P|| / ||Y||``, 0 where Y is.

    Raises:
        ValueError: an empty loader, or a layer that the data do not reach.
    """
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, layer: Any, output: Tensor, x: Tensor) -> None:
        twin = chains[name][1]
        *first, last = [factor.detach() for factor in twin.factors]
        *geometry, (stride, padding, dilation) = factor_geometry(
            twin.kind, len(twin.factors), twin.stride, twin.padding, twin.dilation
        )
        for factor, (s, p, d) in zip(first, geometry, strict=True):
            x = F.conv2d(x, factor, None, s, p, d)
        patches = (
            F.unfold(x, tuple(last.shape[2:]), dilation, padding, stride).movedim(1, -1).reshape(-1, last[0].numel())
        )
        y = output if layer.bias is None else output - layer.bias.reshape(-1, 1, 1)
        y, patches = y.movedim(1, -1).reshape(-1, y.shape[1]).double(), patches.double()
        parts = [patches.t() @ patches, y.t() @ patches, y.square().sum()]
        sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts

    run_with_outputs(op, model, {name: layer for name, (layer, _) in chains.items()}, loader, add, max_batches)
    errors = {}
    for name, (_, twin) in chains.items():
        if name not in sums:
            raise ValueError(f"{op}: expected the calibration data to reach layer {name!r}, they do not")
        gram, cross, whole = sums[name]
        last = twin.factors[-1]
        before = last.detach().double().flatten(1)
        ridge = 1e-9 * float(gram.trace()) / len(gram)
        if ridge > 0:
            system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            before = before + torch.linalg.solve(system, (cross - before @ gram).t()).t()
            with torch.no_grad():
                last.copy_(before.reshape(last.shape))
        left = float(whole - 2 * (cross * before).sum() + ((before @ gram) * before).sum())
        errors[name] = (max(left, 0.0) / float(whole)) ** 0.5 if float(whole) > 0 else 0.0
    return errors


def match_batch_norms(
    op: str, model: nn.Module, norms: Mapping[str, nn.BatchNorm2d], loader: Iterable[Any], max_batches: int | None
) -> None:
    """Sets statistics, weight and bias of fresh batch norms so that each of them changes nothing on the given data.

    The running statistics become those of its inputs, weight and bias undo them: in eval mode exactly the identity, in
    train mode as nearly as a batch's statistics are those of the whole.
    """
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, layer: nn.Module, output: Tensor, x: Tensor) -> None:
        y = output.detach().double()  # a fresh norm's output is its input / sqrt(1 + eps)
        parts = [y.sum((0, 2, 3)), y.square().sum((0, 2, 3)), y.new_tensor(y.numel() // y.shape[1])]
        sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts

    run_with_outputs(op, model, norms, loader, add, max_batches)
    for name, (total, squares, count) in sums.items():
        norm = norms[name]
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (1.0 + norm.eps) ** 0.5
        mean = total / count * scale
        variance = (squares / count * scale**2 - mean.square()).clamp_min(0)
        with torch.no_grad():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)
