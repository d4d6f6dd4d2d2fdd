"""What a training step computes: a module that holds the network and turns a batch into its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.training.evaluation import checked_logits


class TrainingStep(nn.Module):
    """Network and loss in one module, so that both are replicated (DDP), autocast and compiled together.

    ``model`` is the network: what is evaluated, saved and handed to callbacks. Further submodules (a FitNets regressor)
    are trained and checkpointed with it. A teacher must not be a submodule: keep it out of reach of ``parameters()``,
    for instance in a tuple.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        """The scalar loss of a batch: ``images (N, C, H, W)``, int64 ``labels (N,)``, and the samples' places in the
        data set, int64 ``indices (N,)``, from a loader that gives them."""
        raise NotImplementedError

    def recipe(self) -> dict[str, Any]:
        """Plain numbers and strings that a resumed run must share."""
        return {}


class CrossEntropyStep(TrainingStep):
    """Cross-entropy of the model's logits ``(N, classes)``, with labels smoothed by ``label_smoothing`` in [0, 1)."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        logits = checked_logits("fine_tune", self.model, images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
