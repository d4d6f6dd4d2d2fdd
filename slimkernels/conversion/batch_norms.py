"""Batch norms of a model that is trained, made one with the ReLU and the max-pool behind them; and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimkernels.conversion.folding import hidden_reason, is_pool2
from slimkernels.conversion.graph import ModelGraph, has_hooks, parametrized_type, replace_module, trace, unique_names
from slimkernels.nn.batch_norm import FusedBatchNorm2d, RunsInBatchNorm
from slimkernels.nn.block_sparse import BlockSparseConv2d


def fuse_batch_norm_(model: nn.Module, *, take_biases: bool = False) -> nn.Module:
    """Replaces every batch norm by one that runs the ReLU and 2x2 max-pool behind it, in place; for training.

    A ReLU or pool moves where it alone takes the output of what is before it, is called once, and carries no hooks; a
    batch norm with nothing to take still gets the faster kernels. Results are those of the plain model up to rounding.
    Parameters and buffers stay the same tensors under the same names, so optimizers and checkpoints do not notice.
    Make a ``SyncBatchNorm`` of a batch norm before, and call this last: `convert`, in either mode, starts from the
    plain layers again.

    Args:
        model: a model in any mode, on any device; on a CPU in another dtype than float32 it computes as before.
        take_biases: also takes the bias away from a convolution in front of a batch norm, which subtracts it again;
            running means are moved so that eval mode gives the same. Such a bias is no parameter of the model until
            `restore_batch_norm_` brings it back (its gradient would be zero); a frozen batch norm, in eval mode in a
            model in train mode, takes none.

    Returns:
        The model.

    Raises:
        ValueError: the model cannot be traced by ``torch.fx``, with the reason.

    Example:
        >>> from torch import nn
        >>> import slimkernels as sk
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> sk.fuse_batch_norm_(net)[1].epilogue
        'relu_maxpool2'
    """
    graphs = [trace(model, training=training) for training in (True, False)]
    for graph in graphs:
        if graph.reason is not None:
            raise ValueError(f"fuse_batch_norm_: expected a model that torch.fx can trace, got: {graph.reason}")
    uniques = unique_names(model)
    for name, norm in uniques.items():
        if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
            continue
        taken: list[str] = []
        for follower in graphs[0].chain(name):
            last = taken[-1] if taken else name
            module = model.get_submodule(follower)
            fits = is_pool2(module) if taken else type(module) is nn.ReLU
            same = graphs[1].follower.get(last) == follower
            if not fits or not same or hidden_reason(model, uniques, {}, last, follower) is not None:
                break
            taken.append(follower)
            if len(taken) == 2:
                break
        fused = FusedBatchNorm2d.from_batch_norm(norm, ("none", "relu", "relu_maxpool2")[len(taken)])
        layer = _layer_in_front(model, graphs, uniques, name) if take_biases else None
        if layer is not None:
            fused.take_bias_(layer)
        replace_module(model, name, fused)
        for follower in taken:
            replace_module(model, follower, RunsInBatchNorm(model.get_submodule(follower)))
    return model


def _layer_in_front(
    model: nn.Module, graphs: Sequence[ModelGraph], uniques: Mapping[str, nn.Module], norm: str
) -> nn.Module | None:
    """The convolution whose output this batch norm alone reads, where its bias may go and nobody sees it go."""
    if model.training and not uniques[norm].training:
        return None
    found = {name for graph in graphs for name, follower in graph.follower.items() if follower == norm}
    before = min(found, default="")
    layer: Any = uniques.get(before)
    if (
        len(found) != 1
        or layer is None
        or any(graph.follower.get(before) != norm or before in graph.tensor_reads for graph in graphs)
        or parametrized_type(layer) not in (nn.Conv2d, BlockSparseConv2d)
        or getattr(layer, "epilogue", "none") != "none"
        or layer._parameters.get("bias") is None
        or layer.out_channels != uniques[norm].num_features
        or has_hooks(layer)
        or hidden_reason(model, uniques, {}, before, norm) is not None
    ):
        return None
    return layer


def restore_batch_norm_(model: nn.Module) -> nn.Module:
    """Undoes `fuse_batch_norm_` in place: plain batch norms, ReLUs, max-pools and biases are back, with the trained
    tensors.

    Args:
        model: any model.

    Returns:
        The model.
    """
    layers = set(model.modules())
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedBatchNorm2d):
            # A layer that stands elsewhere now has none to add, and running means go on without it.
            if module.giver in layers:
                module.give_bias_back_()
            replace_module(model, name, module.to_batch_norm())
        elif isinstance(module, RunsInBatchNorm):
            replace_module(model, name, module.original.train(module.training))
    return model
