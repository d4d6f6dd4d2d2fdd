"""The trainings that test_distributed compares: run alone, or by torchrun in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import masks
from slimkernels.compress.quantization import QuantizationAware
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.train import fine_tune
from slimkernels.data import TensorLoader


def net(*, batch_norm: bool = False, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
    layers = [nn.Conv2d(1, 32, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Flatten(), nn.Linear(512, 3))


def samples(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    images[torch.arange(n), 0, labels] += 2.0
    return images, labels


def loader(batch_size: int = 32, n: int = 96, **options: Any) -> TensorLoader:
    return TensorLoader(*samples(n), batch_size=batch_size, shuffle=True, crop_padding=1, flip=True, **options)


def validation(batch_size: int) -> TensorLoader:
    return TensorLoader(*samples(), batch_size=batch_size)


class Frozen(Callback):
    """Keeps batch norm in eval mode."""

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        model[1].eval()


class Watch(Callback):
    """What this rank had before ranks were made equal: running statistics, and its next random number."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_epoch_end(self, epoch: int, model: nn.Module) -> None:
        self.seen.append(model[1].running_mean.clone() if isinstance(model[1], nn.BatchNorm2d) else torch.zeros(1))

    def on_step_end(self, step: int, total_steps: int, model: nn.Module) -> None:
        self.seen.append(torch.rand(1))


def train(model: nn.Module, data: Any, **options: Any) -> dict[str, Any]:
    history = fine_tune(model, data, **{"epochs": 2, "lr": 0.02, "progress": False, **options})
    return {
        "model": {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)},
        "history": [(s.loss, s.val_accuracy, s.ema_val_accuracy) for s in history],
    }


def accumulated(batch_size: int = 32, accumulate: int = 1) -> dict[str, Any]:
    return train(net(), loader(batch_size), accumulate=accumulate, val_loader=validation(50), clip_norm=1.0)


def uneven() -> dict[str, Any]:
    """Batches of 15: slices of 7 and 8; the last one of 11."""
    return train(net(), loader(15, n=71))


def frozen() -> dict[str, Any]:
    return train(net(batch_norm=True), loader(), callbacks=[Frozen()])


def dataloader() -> dict[str, Any]:
    """A loader without a generator of its own, that shuffles by torch's."""
    return train(net(), DataLoader(TensorDataset(*samples(71)), batch_size=15, shuffle=True), val_loader=validation(50))


def batches() -> dict[str, Any]:
    """A plain list of batches."""
    images, labels = samples()
    return train(net(), list(zip(images.split(20), labels.split(20), strict=True)))


def few() -> dict[str, Any]:
    """Evaluation whose last batch has one sample, fewer than there are ranks; what training says of such a batch."""
    images, labels = samples(41)
    listed = list(zip(images.split(20), labels.split(20), strict=True))
    single = TensorLoader(images, labels, batch_size=20), DataLoader(TensorDataset(images, labels), 20), listed
    histories = [train(net(), loader(), epochs=1, val_loader=val)["history"] for val in single]
    return {"histories": histories, "refused": [refused(data) for data in single]}


def refused(data: Any) -> str:
    try:
        train(net(), data, epochs=1)
    except ValueError as error:
        return str(error)
    return ""


def divided() -> str:
    """What is said of a loader whose sampler divides the samples already."""
    data = TensorDataset(*samples())
    return refused(DataLoader(data, 16, sampler=DistributedSampler(data)))


def running_statistics(folder: Path) -> dict[str, Any]:
    watch = Watch()
    result = train(net(batch_norm=True, dropout=0.3), loader(), callbacks=[watch], checkpoint=folder / "bn" / "bn.pt")
    return {**result, "seen": watch.seen}


def pruned(folder: Path, *, resume: bool = False, stop: bool = False) -> dict[str, Any]:
    class Stop(Callback):
        def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
            if stop and step == 7:
                raise KeyboardInterrupt

    # every rank its own initial weights and its own folder for logs: rank 0's count
    model = net(seed=int(os.environ.get("RANK", "0")), dropout=0.3)
    callbacks = [Stop(), GradualPruning(0.5, (16, 1), times=4, importance="taylor")]
    name = f"{'part' if resume or stop else 'whole'}.pt"
    try:
        result = train(
            model, loader(), epochs=4, callbacks=callbacks, ema_decay=0.9, val_loader=validation(40), resume=resume,
            checkpoint=folder / name, log_dir=folder / f"log-{os.environ.get('RANK', '0')}",
        )  # fmt: skip
    except KeyboardInterrupt:
        return {}
    return {**result, "masks": {name: mask.mask for name, mask in masks(model).items()}}


def quantized() -> dict[str, Any]:
    """Rounded to int4 with batch norm, whose statistics differ between the ranks until they are made equal."""
    callbacks = [GradualPruning(0.5, (16, 1), times=2, end=0.4), QuantizationAware("int4", begin=0.3)]
    return train(
        net(batch_norm=True), loader(), epochs=3, callbacks=callbacks, ema_decay=0.9, val_loader=validation(40)
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {
        "accumulated": accumulated(),
        "uneven": uneven(),
        "frozen": frozen(),
        "dataloader": dataloader(),
        "batches": batches(),
        "few": few(),
        "divided": divided(),
        "running_statistics": running_statistics(folder),
        "pruned": pruned(folder),
        "stopped": pruned(folder, stop=True),
        "resumed": pruned(folder, resume=True),
        "quantized": quantized(),
    }
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
    # All is done and saved: torch 2.14 alone, with a gloo group and DDP, aborts in 1 of 8 interpreters on the way out.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
