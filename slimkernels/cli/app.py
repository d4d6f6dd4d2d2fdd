"""The ``slimkernels`` command: every step of the flow, progress on stderr, tables for people, ``--json`` for machines.

Exit codes: 0 done, 1 an error (one line, ``slimkernels: ...``, on stderr; ``--debug`` shows where), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from torch import nn

    from slimkernels.compress.train import EpochStats
    from slimkernels.data import TensorLoader


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            typer.echo("slimkernels: interrupted", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            typer.echo(f"slimkernels: {line}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pruned and factorized networks as fast as their FLOP count promises.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Data = Annotated[
    str, typer.Option(help="'digits', a folder {train,test}/<class>/*, or one that holds torchvision's CIFAR-10.")
]
Seed = Annotated[int, typer.Option(help="Of initialisation, batch order and dropout.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.")]
BlockShape = Annotated[str, typer.Option(help="Rows and columns of a block, as in 16x1.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Training state, rewritten after every epoch.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from --checkpoint if it exists.")]
Model = Annotated[str | None, typer.Option(help="Name of the model, where the file does not carry it.")]
Classes = Annotated[int | None, typer.Option(min=1, help="Number of classes, where the file does not carry it.")]


def _version(wanted: bool) -> None:
    if wanted:
        from slimkernels import __version__

        typer.echo(f"slimkernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, the picture and the JSON.")] = Path(
        "slimkernels-demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the three trainings.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.0, help="Timing budget per model and batch size.")] = 1.0,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first convolution.")] = 64,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train, prune, factorize, distil, convert and time a small VGG on real digits; no network needed."""
    from slimkernels.cli.demo import run_demo
    from slimkernels.cli.tables import demo_table

    result = run_demo(
        out, epochs=epochs, seconds=seconds, width=width, seed=seed, progress=not as_json, say=_say(as_json)
    )
    if as_json:
        typer.echo(result.to_json())
        return
    demo_table(result)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, build, processor, GPUs, and which kernels can run here and why others cannot."""
    from slimkernels.cli.info import render, report

    data = report()
    typer.echo(json.dumps(data, indent=2) if as_json else render(data))


@app.command()
def train(
    model: Annotated[str, typer.Option(help="This package's or torchvision's name of a model.")] = "vgg_digits",
    data: Data = "digits",
    out: Annotated[Path | None, typer.Option(help="Weights to write; MODEL.safetensors by default.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: BatchSize = 64,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    schedule: Annotated[str, typer.Option(help="onecycle, cosine or constant.")] = "onecycle",
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a dense model and write its weights."""
    import torch

    from slimkernels import models
    from slimkernels.compress.train import fine_tune

    _check_resume(resume, checkpoint)
    out = out or Path(f"{model}.safetensors")
    train_loader, test_loader = _loaders(data, batch_size, seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.build(model, len(train_loader.classes)).to(device)
    history = fine_tune(
        network, train_loader, test_loader, epochs=epochs, lr=lr, optimizer=optimizer, schedule=schedule,
        weight_decay=weight_decay, seed=seed, progress=not as_json, checkpoint=checkpoint, resume=resume,
    )  # fmt: skip
    _finish_training(network, model, out, history, train_loader, as_json)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Argument(help="Weights of the teacher.")],
    student: Annotated[str, typer.Option(help="Name of the student model.")] = "nin_cifar",
    student_weights: Annotated[Path | None, typer.Option(help="Weights the student starts from.")] = None,
    model: Model = None,
    data: Data = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Weights to write; STUDENT.distilled.safetensors by default.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    temperature: Annotated[float, typer.Option(help="T of the soft targets.")] = 4.0,
    soft_weight: Annotated[float, typer.Option(help="Share of the soft loss.")] = 0.7,
    sparsity: Annotated[float, typer.Option(help="Prune this share of the blocks meanwhile; 0 prunes nothing.")] = 0.0,
    block_shape: BlockShape = "16x1",
    batch_size: BatchSize = 64,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    schedule: Annotated[str, typer.Option(help="onecycle, cosine or constant.")] = "onecycle",
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a student against a teacher's soft labels, pruning it gradually if --sparsity is given."""
    import torch

    from slimkernels import models
    from slimkernels.cli.weights import load_model
    from slimkernels.compress.distill import distill as run_distill
    from slimkernels.compress.prune import finalize_
    from slimkernels.compress.train import GradualPruning

    _check_resume(resume, checkpoint)
    shape = _block_shape(block_shape)
    teacher_model, _, classes, _ = load_model(teacher, model)
    if student_weights is not None:
        network = load_model(student_weights, student, classes)[0]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = models.build(student, classes)
    train_loader, test_loader = _loaders(data, batch_size, seed, device)
    history = run_distill(
        network.to(device), teacher_model.to(device), train_loader, test_loader, epochs=epochs, lr=lr,
        temperature=temperature, soft_weight=soft_weight, optimizer=optimizer, schedule=schedule, seed=seed,
        on_step=GradualPruning(sparsity, shape) if sparsity else None, progress=not as_json,
        checkpoint=checkpoint, resume=resume,
    )  # fmt: skip
    out = out or Path(f"{student}.distilled.safetensors")
    _finish_training(finalize_(network), student, out, history, train_loader, as_json)


@app.command()
def compress(
    weights: Annotated[Path, typer.Argument(help="Weights: .safetensors, or torch's .pt without pickled code.")],
    model: Model = None,
    num_classes: Classes = None,
    method: Annotated[str, typer.Option(help="prune, svd, tai or tucker2.")] = "prune",
    sparsity: Annotated[float, typer.Option(help="Share of blocks to prune.")] = 0.875,
    block_shape: BlockShape = "16x1",
    scope: Annotated[str, typer.Option(help="layer or global: where blocks are ranked against each other.")] = "layer",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every factorized layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of each weight's energy to keep.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Only these layers (name or pattern; repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these layers (name or pattern; repeatable).")] = None,
    data: Annotated[str | None, typer.Option(help="Data to recover accuracy on, as in train; none by default.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the recovery.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the recovery.")] = 0.02,
    teach: Annotated[bool, typer.Option(help="Recover by distilling from the uncompressed model.")] = True,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    out: Annotated[Path | None, typer.Option(help="Weights to write; NAME.compressed.safetensors by default.")] = None,
    as_json: Json = False,
) -> None:
    """Prune or factorize a trained model, recover its accuracy if --data is given, and write its weights."""
    import copy

    from slimkernels.cli.weights import load_model
    from slimkernels.compress.distill import distill as run_distill
    from slimkernels.compress.factorize import factorize_
    from slimkernels.compress.prune import finalize_, prune_
    from slimkernels.compress.train import fine_tune

    _check_resume(resume, checkpoint)
    if method not in ("prune", "svd", "tai", "tucker2"):
        raise ValueError(f"compress: expected method prune, svd, tai or tucker2, got {method!r}")
    dense, name, classes, _ = load_model(weights, model, num_classes)
    network = copy.deepcopy(dense)
    if method == "prune":
        prune_(network, sparsity, _block_shape(block_shape), scope=scope, layers=layer or None, exclude=exclude or None)
    else:
        factorize_(network, method, rank=rank, energy=energy, layers=layer or None, exclude=exclude or None)
    history: list[EpochStats] = []
    loader = None
    if data is not None:
        loader, test_loader = _loaders(data, batch_size, seed, device)
        common: dict[str, Any] = {
            "epochs": epochs, "lr": lr, "seed": seed, "progress": not as_json, "checkpoint": checkpoint,
            "resume": resume,
        }  # fmt: skip
        network = network.to(device)
        if teach:
            history = run_distill(network, dense.to(device), loader, test_loader, **common)
        else:
            history = fine_tune(network, loader, test_loader, **common)
    out = out or Path(f"{weights.stem}.compressed.safetensors")
    _finish_training(finalize_(network), name, out, history, loader, as_json, classes)


@app.command()
def convert(
    weights: Annotated[Path, typer.Argument(help="Weights of a pruned or factorized model.")],
    model: Model = None,
    num_classes: Classes = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size to decide for (repeatable); 1 and 16 by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Image height and width, as in 32x32.")] = None,
    without_shapes: Annotated[
        bool, typer.Option("--without-shapes", help="Let the cost model decide instead of the stopwatch.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a layer cannot be taken.")] = False,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.slim.safetensors by default.")] = None,
    as_json: Json = False,
) -> None:
    """Swap in the sparse and low-rank kernels where they are faster, and write a .slim.safetensors file."""
    import torch

    from slimkernels import models
    from slimkernels.checkpoint import save
    from slimkernels.cli.weights import load_model
    from slimkernels.conversion import convert as run_convert
    from slimkernels.conversion import explain as run_explain

    dense, name, classes, _ = load_model(weights, model, num_classes)
    channels, height, width = models.input_shape(name)
    if size is not None:
        height, width = _pair("--size", size)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, channels, height, width, generator=generator).to(device) for n in batch or (1, 16)]
    fast = run_convert(dense.to(device), None if without_shapes else [(x,) for x in images], strict=strict)
    out = out or Path(f"{weights.name.split('.')[0]}.slim.safetensors")
    save(fast, out)
    if as_json:
        plan = json.loads(fast.slimkernels_plan.to_json())
        _print_json(
            {"file": str(out), "bytes": out.stat().st_size, "model": name, "num_classes": classes, "plan": plan}
        )
        return
    typer.echo(str(run_explain(fast)))
    typer.echo(
        f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB); the weights were {weights.stat().st_size / 1e6:.2f} MB"
    )


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="A .slim.safetensors file.")],
    as_json: Json = False,
) -> None:
    """Show what conversion did to every layer of a .slim.safetensors file, and why."""
    from slimkernels.conversion import explain as run_explain

    report = run_explain(file)
    typer.echo(report.to_json() if as_json else str(report))


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="This package's or torchvision's name of a model.")] = "vgg19_cifar",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; 1, 16 and 128 by default.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Repeatable; 0.75, 0.875, 0.95 by default.")] = None,
    block_shape: BlockShape = "16x1",
    seconds: Annotated[float, typer.Option(min=0.0, help="Timing budget per network and batch size.")] = 3.0,
    compile: Annotated[bool, typer.Option(help="Also try torch.compile as a dense baseline.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time a network with random weights, dense against pruned and converted."""
    import torch

    from slimkernels.cli.bench import run_bench
    from slimkernels.cli.tables import bench_table

    if threads is not None:
        torch.set_num_threads(threads)
    result = run_bench(
        model,
        sparsities=sparsity or (0.75, 0.875, 0.95),
        batches=batch or (1, 16, 128),
        block_shape=_block_shape(block_shape),
        seconds=seconds,
        compile=compile,
        device=device,
        say=_say(as_json),
    )
    if as_json:
        _print_json(result.as_dict())
    else:
        bench_table(result)


def _say(as_json: bool) -> Any:
    """A function for lines of progress: stderr, so that stdout holds the result alone; silent for machines."""
    return (lambda line: None) if as_json else (lambda line: typer.echo(line, err=True))


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def _check_resume(resume: bool, checkpoint: Path | None) -> None:
    if resume and checkpoint is None:
        raise ValueError("--resume: expected --checkpoint FILE with it")


def _pair(option: str, text: str) -> tuple[int, int]:
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected two positive numbers as in 16x1, got {text!r}")
    return int(parts[0]), int(parts[1])


def _block_shape(text: str) -> tuple[int, int]:
    return _pair("--block-shape", text)


def _loaders(data: str, batch_size: int, seed: int, device: str) -> tuple[TensorLoader, TensorLoader]:
    from slimkernels.data import loaders

    return loaders(data, batch_size, seed, device=device)


def _finish_training(
    network: nn.Module,
    name: str,
    out: Path,
    history: Sequence[EpochStats],
    loader: TensorLoader | None,
    as_json: bool,
    classes: int | None = None,
) -> None:
    """Writes the weights and says how good they are."""
    from slimkernels.cli.weights import write_weights

    count = classes if loader is None else len(loader.classes)
    assert count is not None
    accuracy = history[-1].val_accuracy if history else None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(network, out, name=name, num_classes=count, notes={"accuracy": accuracy})
    parameters = sum(p.numel() for p in network.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in network.parameters())
    if as_json:
        _print_json(
            {
                "file": str(out),
                "bytes": out.stat().st_size,
                "model": name,
                "num_classes": count,
                "parameters": parameters,
                "nonzero": nonzero,
                "accuracy": accuracy,
                "epochs": [asdict(stats) for stats in history],
            }
        )
        return
    for stats in history:
        shown = "" if stats.val_accuracy is None else f", accuracy {stats.val_accuracy:.2%}"
        typer.echo(f"epoch {stats.epoch}: loss {stats.loss:.4f}{shown} ({stats.seconds:.1f} s)")
    typer.echo(
        f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB, {nonzero:,} of {parameters:,} parameters are not zero)"
    )
