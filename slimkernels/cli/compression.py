"""``slimkernels compress``, ``convert`` and ``explain``: from trained weights to a fast file, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkernels.cli import options as o

if TYPE_CHECKING:
    from slimkernels.compress.training.callbacks import Callback
    from slimkernels.compress.training.train import EpochStats

_METHODS = ("prune", "svd", "tai", "tucker2")


def compress(
    weights: Annotated[Path, typer.Argument(help="Weights: .safetensors, or torch's .pt without pickled code.")],
    model: o.Model = None,
    option: o.ModelOption = None,
    num_classes: o.Classes = None,
    method: Annotated[str, typer.Option(help="prune, svd, tai or tucker2.")] = "prune",
    sparsity: Annotated[float, typer.Option(help="Share of blocks to prune.")] = 0.875,
    block_shape: o.BlockShape = "16x1",
    granularity: Annotated[str, typer.Option(help="block, element, channel or block_shared_taps.")] = "block",
    importance: Annotated[
        str, typer.Option(help="magnitude or magnitude_l1; with --gradual also taylor, movement.")
    ] = ("magnitude"),
    scope: Annotated[str, typer.Option(help="layer or global: where blocks are ranked against each other.")] = "layer",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every factorized layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of each weight's energy to keep.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Only these layers (name or pattern; repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these layers (name or pattern; repeatable).")] = None,
    gradual: Annotated[
        bool, typer.Option("--gradual/--one-shot", help="With --data: prune along the cubic schedule, or at once.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Data to recover accuracy on, as in train; none by default.")] = None,
    image_size: o.ImageSize = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the recovery.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the recovery.")] = 0.02,
    teach: Annotated[bool, typer.Option(help="Recover by distilling from the uncompressed model.")] = True,
    quantize: o.Quantize = None,
    quantize_begin: o.QuantizeBegin = 0.6,
    batch_size: o.BatchSize = 64,
    precision: o.Precision = "fp32",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    log_dir: o.LogDir = None,
    out: Annotated[Path | None, typer.Option(help="Weights to write; NAME.compressed.safetensors by default.")] = None,
    as_json: o.Json = False,
) -> None:
    """Prune or factorize a trained model, recover its accuracy if --data is given, and write its weights."""
    import copy

    from slimkernels.cli.weights import load_model
    from slimkernels.compress.distillation.distill import distill as run_distill
    from slimkernels.compress.factorization.factorize import factorize_
    from slimkernels.compress.pruning.gradual import GradualPruning
    from slimkernels.compress.pruning.prune import finalize_, prune_
    from slimkernels.compress.quantization import QuantizationAware
    from slimkernels.compress.training.train import TrainConfig, fine_tune

    o.check_resume(resume, checkpoint)
    if method not in _METHODS:
        raise ValueError(f"compress: expected method prune, svd, tai or tucker2, got {method!r}")
    if gradual and (method != "prune" or data is None):
        raise ValueError("compress: expected --method prune and --data with --gradual, which prunes while training")
    if quantize is not None and data is None:
        raise ValueError("compress: expected --data with --quantize, which rounds weights while training")
    shape = o.pair("--block-shape", block_shape)
    target = o.check_writable(out or Path(f"{weights.stem}.compressed.safetensors"))
    dense, name, classes, description = load_model(weights, model, num_classes, options=o.model_options(option))
    network = copy.deepcopy(dense)
    which: dict[str, Any] = {"layers": layer or None, "exclude": exclude or None}
    how: dict[str, Any] = {"granularity": granularity, "importance": importance, "scope": scope, **which}
    callbacks: list[Callback] = []
    if gradual:
        callbacks.append(GradualPruning(sparsity, shape, **how))
    elif method == "prune":
        prune_(network, sparsity, shape, **how)
    else:
        factorize_(network, method, rank=rank, energy=energy, **which)
    if quantize is not None:
        callbacks.append(QuantizationAware(quantize, begin=quantize_begin))
    history: list[EpochStats] = []
    if data is not None:
        config = TrainConfig(epochs, lr, precision=precision, seed=seed)
        device = o.training_device(device)
        loader, test_loader = o.data_loaders(data, batch_size, seed, device, image_size)
        common: dict[str, Any] = {
            "callbacks": callbacks,
            "progress": o.progress(as_json),
            "checkpoint": checkpoint,
            "resume": resume,
            "log_dir": log_dir,
        }
        network = network.to(device)
        o.check_images("compress", network, test_loader, data)
        if teach:
            history = run_distill(network, dense.to(device), loader, test_loader, config, **common)
        else:
            history = fine_tune(network, loader, test_loader, config, **common)
    o.finish_training(finalize_(network), name, target, history, as_json, classes, description.options)


def convert(
    weights: Annotated[
        Path | None,
        typer.Argument(help="Weights of a pruned or factorized model; none with a --model that brings them."),
    ] = None,
    model: o.AnyModel = None,
    shape: o.InputShapes = None,
    option: o.ModelOption = None,
    num_classes: o.Classes = None,
    batch: o.DecideBatches = None,
    size: o.Size = None,
    without_shapes: o.WithoutShapes = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a layer cannot be taken.")] = False,
    device: o.Device = "cpu",
    values: Annotated[
        str, typer.Option(help="fp32, or bf16, int8 or int4 for a compact file of values rounded to it.")
    ] = "fp32",
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.slim.safetensors by default.")] = None,
    as_json: o.Json = False,
) -> None:
    """Swap in the sparse and low-rank kernels where they are faster, and write a .slim.safetensors file."""
    from slimkernels.checkpoint import save
    from slimkernels.cli.own_model import example_batches, open_model
    from slimkernels.conversion import convert as run_convert
    from slimkernels.conversion import explain as run_explain
    from slimkernels.conversion.compact_index import VALUES

    if values not in VALUES:
        raise ValueError(f"convert: expected --values in {', '.join(VALUES)}, got {values!r}")
    device = o.training_device(device)
    opened = open_model("convert", weights, model, num_classes, o.model_options(option))
    inputs = example_batches(
        "convert", opened, shape, batches=batch, size=size, without_shapes=without_shapes, device=device
    )
    out = o.check_writable(out or Path(f"{opened.stem}.slim.safetensors"))
    fast = run_convert(opened.network.to(device), inputs, strict=strict, progress=o.progress(as_json))
    save(fast, out, values=values, builder=opened.builder)
    if as_json:
        # For mypy: a model's own attribute, a Tensor or a Module to mypy.
        plan = json.loads(fast.slimkernels_plan.to_json())  # type: ignore[union-attr, operator]
        written = {"file": str(out), "bytes": out.stat().st_size}
        o.print_json({**written, "model": opened.name, "num_classes": opened.num_classes, "plan": plan})
        return
    o.echo(str(run_explain(fast)))
    were = "" if weights is None else f"; the weights were {weights.stat().st_size / 1e6:.2f} MB"
    o.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB){were}")


def explain(
    file: Annotated[
        Path | None, typer.Argument(help="A .slim.safetensors file; or, with --model, weights of that model.")
    ] = None,
    model: o.AnyModel = None,
    shape: o.InputShapes = None,
    option: o.ModelOption = None,
    num_classes: o.Classes = None,
    batch: o.DecideBatches = None,
    size: o.Size = None,
    without_shapes: o.WithoutShapes = False,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Show what conversion did to every layer of a .slim.safetensors file, or would do to a --model, and why."""
    from slimkernels.checkpoint import load
    from slimkernels.cli.own_model import build_own, example_batches, is_own, open_model
    from slimkernels.conversion import convert as run_convert
    from slimkernels.conversion import explain as run_explain

    keywords = o.model_options(option)
    if file is None and model is None:
        raise typer.BadParameter(
            "explain: expected a .slim.safetensors file, or --model FILE.py:NAME, a model of your own"
        )
    if file is not None and (model is None or file.name.endswith(".slim.safetensors")):
        if is_own(model):
            assert model is not None
            load(file, into=build_own(model, keywords))  # whether the file is of this model
        report = run_explain(file)
    else:
        device = o.training_device(device)
        opened = open_model("explain", file, model, num_classes, keywords)
        network = opened.network.to(device)
        if not hasattr(network, "slimkernels_plan"):
            inputs = example_batches(
                "explain", opened, shape, batches=batch, size=size, without_shapes=without_shapes, device=device
            )
            network = run_convert(network, inputs, progress=o.progress(as_json))
        report = run_explain(network)
    o.echo(report.to_json() if as_json else str(report))
