"""Outputs of named layers, recorded while a model runs, and brought to one image size."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F


class FeatureTap:
    """Records what the named layers of a model return.

    Outputs are cloned, so that an in-place ReLU behind a layer does not change what was recorded of it. A layer that
    runs more than once leaves its last output.

    Args:
        op: public function's name, which begins every message.
        whose: "student" or "teacher", for the messages.
        model: any module.
        names: exact names as in ``model.named_modules()``.

    Raises:
        ValueError: a name that is no layer of the model; near matches are listed.
    """

    def __init__(self, op: str, whose: str, model: nn.Module, names: Iterable[str]) -> None:
        self.op, self.whose = op, whose
        modules = dict(model.named_modules(remove_duplicate=False))
        self.layers: dict[str, nn.Module] = {}
        for name in names:
            if name not in modules or not name:
                known = [n for n in modules if n]
                near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3) or known[:3]
                raise ValueError(
                    f"{op}: expected a layer of the {whose}, got {name!r}; near matches: {', '.join(near) or 'none'}"
                )
            self.layers[name] = modules[name]
        self._recorded: dict[str, Tensor] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the layers inside the block."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Layer name -> its output in the forward pass run inside the block."""
        recorded: dict[str, Tensor] = {}
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None
        missing = [name for name in self.layers if name not in recorded]
        if missing:
            raise ValueError(
                f"{self.op}: expected layer {missing[0]!r} of the {self.whose} to run in its forward pass, it did not"
            )

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # a closure of the type that torch expects
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if self._recorded is None:
                return
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{self.op}: expected layer {name!r} of the {self.whose} to return a tensor, "
                    f"got {type(output).__name__}"
                )
            self._recorded[name] = output.clone()

        return hook


def same_image_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature maps ``(N, C, H, W)`` average-pooled to the smaller height and width of the two.

    Features of another number of dimensions come back as they are.
    """
    if student.dim() != 4 or teacher.dim() != 4:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(features: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = features.shape[2:]
    if (height, width) == size:
        return features
    if height % size[0] == 0 and width % size[1] == 0:  # has a deterministic gradient on GPUs, adaptive pooling has not
        return F.avg_pool2d(features, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(features, size)


def layer_pairs(term: str, layers: str | Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Student's layer -> teacher's layer, from a mapping, or from names that are the same in both.

    Raises:
        TypeError: other than names. ValueError: none. Messages begin with ``term``.
    """
    if isinstance(layers, str):
        pairs = {layers: layers}
    elif isinstance(layers, Mapping):
        pairs = dict(layers)
    else:
        pairs = {name: name for name in layers}
    for name in (*pairs, *pairs.values()):
        if not isinstance(name, str):
            raise TypeError(f"{term}: expected layers to hold names of layers, got {name!r}")
    if not pairs:
        raise ValueError(f"{term}: expected at least one layer, got none")
    return pairs
