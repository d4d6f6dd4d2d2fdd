"""What the commands share: their options, how they read them, and how they print (under torchrun rank 0 alone)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkernels import env
from slimkernels.files import write_obstacle

if TYPE_CHECKING:
    from torch import nn

    from slimkernels.compress.training.train import EpochStats
    from slimkernels.data import TensorLoader

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Data = Annotated[
    str,
    typer.Option(
        help="'digits', cifar10:DIR, cifar100:DIR, or a folder or .tar with {train,test}/<class>/* inside.",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Scale and crop the images of a folder or .tar to this height and width."),
]
Seed = Annotated[int, typer.Option(help="Of initialisation, batch order and dropout.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch, over all processes.")]
BlockShape = Annotated[str, typer.Option(help="Rows and columns of a block, as in 16x1.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Training state, rewritten after every epoch.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from --checkpoint if it exists.")]
LogDir = Annotated[Path | None, typer.Option(help="Folder for epochs.csv, steps.csv and TensorBoard's files.")]
Model = Annotated[str | None, typer.Option(help="Name of the model, where the file does not carry it.")]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model", help="Name of the model where the file does not carry it, or FILE.py:NAME, a function of your own."
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of a batch, as in 1,3,224,224 (repeatable), instead of --batch and --size."),
]
DecideBatches = Annotated[
    list[int] | None,
    typer.Option("--batch", min=1, help="Batch size to decide for (repeatable); 1 and 16 by default."),
]
Size = Annotated[str | None, typer.Option(help="Image height and width, as in 32x32.")]
WithoutShapes = Annotated[
    bool, typer.Option("--without-shapes", help="Let the cost model decide instead of the stopwatch.")
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Train the last part with weights rounded as convert --values will: int8, int4 or bf16."),
]
QuantizeBegin = Annotated[float, typer.Option(help="Share of the training before that part.")]
Classes = Annotated[int | None, typer.Option(min=1, help="Number of classes, where the file does not carry it.")]
ModelOption = Annotated[
    list[str] | None, typer.Option("--option", help="The model's own keyword, as in width=0.5 (repeatable).")
]
Epochs = Annotated[int, typer.Option(min=1, help="Length of the whole run, a resumed part included.")]
Optimizer = Annotated[str, typer.Option(help="sgd or adamw.")]
Schedule = Annotated[str, typer.Option(help="onecycle, cosine, step or constant.")]
Warmup = Annotated[float, typer.Option(min=0.0, help="Epochs over which the learning rate rises from 0.")]
WeightDecay = Annotated[float, typer.Option(min=0.0, help="Of tensors with two or more dimensions.")]
LabelSmoothing = Annotated[float, typer.Option(help="In [0, 1).")]
ClipNorm = Annotated[float | None, typer.Option(help="Largest norm of the gradients.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Batches per optimiser step.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Ema = Annotated[float | None, typer.Option(help="Decay of an exponential average of the weights, such as 0.999.")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the training step through torch.compile.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Deterministic algorithms alone.")]


def echo(text: str) -> None:
    """Prints a line of results on stdout, on rank 0."""
    if env.rank() == 0:
        typer.echo(text)


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout, on rank 0."""
    echo(json.dumps(value, indent=2))


def say(as_json: bool) -> Callable[[str], None]:
    """A function for lines of progress: stderr, so that stdout holds the result alone; silent for machines."""
    if as_json or env.rank() > 0:
        return lambda line: None
    return lambda line: typer.echo(line, err=True)


class _ToStderr(logging.Handler):
    """Lines on whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record in a line."""
        typer.echo(record.getMessage(), err=True)


def progress(as_json: bool) -> bool:
    """Whether bars may be shown: for people, by one process.

    Where stderr is no terminal, which shows no bars, lines of the package's log take their place as things happen.
    """
    shown = not as_json and env.rank() == 0
    log = logging.getLogger("slimkernels")
    if shown and not sys.stderr.isatty():
        if not any(isinstance(handler, _ToStderr) for handler in log.handlers):
            log.addHandler(_ToStderr())
        log.setLevel(logging.INFO)
    else:
        log.setLevel(logging.WARNING)
    return shown


def pair(option: str, text: str) -> tuple[int, int]:
    """Two positive numbers from ``16x1``. Raises ValueError that begins with the option's name."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected two positive numbers as in 16x1, got {text!r}")
    return int(parts[0]), int(parts[1])


def model_options(values: Sequence[str] | None) -> dict[str, Any]:
    """``["width=0.5"]`` as keywords; values are read as JSON, and as text where they are none.

    Raises:
        ValueError: an entry without "=".
    """
    options: dict[str, Any] = {}
    for entry in values or ():
        name, equals, text = entry.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--option: expected NAME=VALUE as in width=0.5, got {entry!r}")
        try:
            options[name.strip()] = json.loads(text)
        except ValueError:
            options[name.strip()] = text
    return options


def training_device(device: str) -> str:
    """The device as given; under torchrun ``cuda`` becomes this process's own GPU.

    Raises:
        ValueError: ``cuda`` where torch sees none, or another name.
    """
    import torch

    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device")
        local_rank = env.local_rank()
        if device == "cuda" and local_rank is not None:
            torch.cuda.set_device(local_rank)
    return device


def check_resume(resume: bool, checkpoint: Path | None) -> None:
    """Raises ValueError for --resume without --checkpoint, and for a checkpoint that a new run would overwrite."""
    if resume and checkpoint is None:
        raise ValueError("--resume: expected --checkpoint FILE with it")
    if checkpoint is not None and not resume and env.rank() == 0 and checkpoint.exists():
        raise ValueError(
            f"--checkpoint: {checkpoint} holds a run already, which a new one would overwrite; continue it with "
            "--resume, or give another file, or remove it"
        )


def check_writable(out: Path) -> Path:
    """The file of --out, whose folder is made; before the work whose result it is to hold.

    Raises:
        OSError: it cannot be written; nothing is left of the trial.
    """
    if env.rank() > 0:
        return out
    error = write_obstacle(out)
    if error is not None:
        raise OSError(f"--out: expected a file that can be written, got {out}: {error.strerror}") from error
    return out


def data_loaders(
    data: str, batch_size: int, seed: int, device: str, size: int | None
) -> tuple[TensorLoader, TensorLoader]:
    """Training and test loader of ``--data``, scaled to ``--image-size``."""
    from slimkernels.recipes.sources import open_data

    return open_data(data, batch_size, seed, size=size, device=device, progress=env.rank() == 0)


def check_images(op: str, network: nn.Module, loader: TensorLoader, data: str) -> None:
    """Raises ValueError where a network, on the loader's device, does not run on the test images of ``--data``."""
    import torch

    from slimkernels.compress.training.evaluation import mode_of
    from slimkernels.conversion.graph import in_a_line

    image = next(iter(loader))[0][:1]
    try:
        with torch.no_grad(), mode_of(network, training=False):
            network(image)
    except Exception as error:  # the model's own code runs here
        shape = "x".join(map(str, image.shape[1:]))
        raise ValueError(
            f"{op}: expected images that the model takes, got {shape} in {data} ({in_a_line(error)})"
        ) from error


def finish_training(
    network: nn.Module,
    name: str,
    out: Path,
    history: Sequence[EpochStats],
    as_json: bool,
    classes: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Writes the weights and says how good they are; on rank 0 alone."""
    from slimkernels.cli.weights import write_weights
    from slimkernels.compress.training.config import epoch_line

    if env.rank() > 0:
        return
    accuracy = None
    if history:
        averaged = history[-1].ema_val_accuracy
        accuracy = history[-1].val_accuracy if averaged is None else averaged
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(network, out, name=name, num_classes=classes, options=options, notes={"accuracy": accuracy})
    parameters = sum(p.numel() for p in network.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in network.parameters())
    if as_json:
        print_json(
            {
                "file": str(out),
                "bytes": out.stat().st_size,
                "model": name,
                "num_classes": classes,
                "parameters": parameters,
                "nonzero": nonzero,
                "accuracy": accuracy,
                "epochs": [asdict(stats) for stats in history],
            }
        )
        return
    for stats in history:
        echo(epoch_line(stats))
    echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB, {nonzero:,} of {parameters:,} parameters are not zero)")
