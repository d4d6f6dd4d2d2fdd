"""What can be told of a tensor without reading it: whether it is plain, and whether it still holds what it held."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils.weak import WeakIdKeyDictionary


def _plain_keys() -> frozenset[int]:
    """The dispatch keys of a strided tensor on the CPU or a GPU, and of one made in inference mode."""
    found = {torch._C._dispatch_keys(torch.empty(0)).raw_repr()}
    for device in ("CPU", "CUDA"):
        inference = DispatchKeySet(getattr(DispatchKey, device)) | DispatchKeySet(
            getattr(DispatchKey, f"Autocast{device}")
        )
        autograd = DispatchKeySet(getattr(DispatchKey, f"Autograd{device}"))
        found |= {k.raw_repr() for k in (inference, inference | autograd | DispatchKeySet(DispatchKey.ADInplaceOrView))}
    return frozenset(found)


_PLAIN_KEYS = _plain_keys()
_dispatch_keys = torch._C._dispatch_keys


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its elements as they are, and nothing but torch's CPU or CUDA code sees its use.

    False for sparse, nested, quantised and meta tensors, for lazy negatives and conjugates (``torch._neg_view``,
    ``x.conj()``), for zero tensors without memory, and for what torch.func, functionalisation or a
    ``__torch_dispatch__`` subclass wraps. A ``__torch_function__`` subclass shows in its type alone.
    """
    return _dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS


class Snapshot:
    """The storage and the version of a tensor at one moment.

    Torch counts in-place writes in a tensor's version. It does not count writes through ``.data``, through memory that
    a tensor shares with NumPy, or to inference tensors.
    """

    __slots__ = ("_alias", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # The alias keeps the storage alive, so no other storage can take its address.
        self._alias, self._version = tensor.detach(), version(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor has the storage, the sizes and the version of the snapshot."""
        # `version` written out, because a layer asks this in every call.
        return tensor.is_set_to(self._alias) and (0 if tensor.is_inference() else tensor._version) == self._version


class Snapshots:
    """Snapshots of several tensors, which are kept with them: of what a copy was made for a kernel, say."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs = [(Snapshot(tensor), tensor) for tensor in tensors]

    def hold(self) -> bool:
        """Whether all of them are as they were."""
        return all(snapshot.holds(tensor) for snapshot, tensor in self._pairs)


def version(tensor: Tensor) -> int:
    """The number of in-place writes that torch counted; 0 for inference tensors, which count none."""
    return 0 if tensor.is_inference() else tensor._version


class Checked:
    """Remembers tensors whose contents passed a check, so that calls with the same tensors need not read them again.

    A tensor is forgotten when it dies. Inference tensors count no writes and are never remembered.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def knows(self, what: Hashable, *tensors: Tensor) -> bool:
        """Whether these tensors passed this check and were not written to since."""
        known = self._known.get(tensors[0])
        if known is None or known[0] != what:
            return False
        return all(snapshot.holds(tensor) for snapshot, tensor in zip(known[1], tensors))

    def remember(self, what: Hashable, *tensors: Tensor) -> None:
        """Notes that these tensors passed this check."""
        if not any(tensor.is_inference() for tensor in tensors):
            self._known[tensors[0]] = what, tuple(Snapshot(tensor) for tensor in tensors)


_Found = TypeVar("_Found", bound=tuple[Tensor | None, ...])


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream, and the tensor is one that its kernels may read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# Where `keep_for_graphs` puts aliases: with each graph that `slimkernels.capture` is capturing, else with their owners.
_GRAPHS_BEING_CAPTURED: list[list[Tensor]] = []
_READ_BY_GRAPHS = WeakIdKeyDictionary()


def keep_for_graphs(owner: Any, tensors: Iterable[Tensor]) -> None:
    """Keeps the memory of tensors that a CUDA graph in capture reads; does nothing while none is captured.

    A graph reads its tensors at their addresses. The user keeps those that they know of, weights say; this is for those
    that this package makes behind the user's back and drops once something was written to: packs, and what follows from
    a pattern. A graph of `slimkernels.capture` keeps them itself; for any other they stay as long as ``owner`` lives.

    Args:
        owner: a tensor or module that the user keeps for as long as the graph runs.
        tensors: what the kernels read, those on the CPU passed over.
    """
    read = [tensor for tensor in tensors if is_capturing(tensor)]
    if not read:
        return
    for kept in _GRAPHS_BEING_CAPTURED or [_READ_BY_GRAPHS.setdefault(owner, [])]:
        known = {alias.untyped_storage().data_ptr() for alias in kept}
        for tensor in read:
            if tensor.untyped_storage().data_ptr() not in known:
                known.add(tensor.untyped_storage().data_ptr())
                kept.append(tensor.detach())


@contextmanager
def kept_with_a_graph() -> Iterator[list[Tensor]]:
    """Collects what `keep_for_graphs` is given meanwhile, on any thread: a backward pass runs on threads of its own."""
    kept: list[Tensor] = []
    _GRAPHS_BEING_CAPTURED.append(kept)
    try:
        yield kept
    finally:
        # By identity: two empty lists are equal.
        _GRAPHS_BEING_CAPTURED[:] = [other for other in _GRAPHS_BEING_CAPTURED if other is not kept]


class Derived:
    """Keeps what was computed from tensors, so that calls with the same tensors need not compute it again.

    It is computed again, too, where somebody wrote to one of the tensors that were handed out, and dropped when the
    first of the tensors that it follows from dies. Inference tensors count no writes: with one of those among them,
    every call computes. What is handed out while a CUDA graph is captured is kept for that, as `keep_for_graphs` says.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def of(self, what: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], _Found]) -> _Found:
        """``compute()``, or what it returned for these very tensors and ``what`` if none was written to since."""
        known = self._known.get(tensors[0])
        if known is not None and known[0] == what:
            found: _Found = known[2]
            if all(map(Snapshot.holds, known[1], _tensors(*tensors, *found))):
                keep_for_graphs(tensors[0], _tensors(*found))
                return found
        found = compute()
        everything = _tensors(*tensors, *found)
        if not any(tensor.is_inference() for tensor in everything):
            self._known[tensors[0]] = what, tuple(map(Snapshot, everything)), found
        return found


def _tensors(*found: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in found if tensor is not None]
