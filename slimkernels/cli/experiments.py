"""``slimkernels demo``, ``bench``, ``info`` and ``reproduce``: whole experiments, and where they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slimkernels.cli import options as o


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, the picture and the JSON.")] = Path(
        "slimkernels-demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the three trainings.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.0, help="Timing budget per model and batch size.")] = 1.0,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first convolution.")] = 64,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Train, prune, factorize, distil, convert and time a small VGG on real digits; no network needed."""
    from slimkernels.cli.demo import run_demo
    from slimkernels.cli.tables import demo_table

    result = run_demo(
        out, epochs=epochs, seconds=seconds, width=width, seed=seed, progress=not as_json, say=o.say(as_json)
    )
    if as_json:
        o.echo(result.to_json())
        return
    demo_table(result)


def info(as_json: o.Json = False) -> None:
    """Versions, build, processor, GPUs, and which kernels can run here and why others cannot."""
    from slimkernels.cli.info import render, report

    data = report()
    o.echo(json.dumps(data, indent=2) if as_json else render(data))


def bench(
    model: Annotated[
        str,
        typer.Option(help="This package's or torchvision's name of a model, or FILE.py:NAME, a function of your own."),
    ] = "vgg19_cifar",
    option: o.ModelOption = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of a batch of a model of your own, as in 1,3,224,224 (repeatable)."),
    ] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="The rows of the README's table of VGG-19 on a CPU, and these alone.")
    ] = False,
    recorded: Annotated[
        bool, typer.Option("--recorded/--modules", help="Serve the converted network by graphed, or call it as it is.")
    ] = True,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; 1, 16 and 128 by default.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Repeatable; 0.75, 0.875, 0.95 by default.")] = None,
    block_shape: o.BlockShape = "16x1",
    seconds: Annotated[float, typer.Option(min=0.0, help="Timing budget per network and batch size.")] = 3.0,
    compile: Annotated[bool, typer.Option(help="Also try torch.compile as a dense baseline.")] = True,
    peers: Annotated[bool, typer.Option(help="Also try ONNX Runtime and OpenVINO, where they are installed.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Time a network, the fastest dense engine that is installed against pruned and converted."""
    import torch

    from slimkernels.cli.bench import README_CASES, run_bench
    from slimkernels.cli.own_model import build_own, check_runs, example_inputs, is_own
    from slimkernels.cli.tables import bench_table

    network = image = None
    if is_own(model):
        if not shape:
            raise ValueError("bench: expected --input SHAPE, as in 1,3,224,224, with a model of your own")
        shapes = [tuple(x.shape) for x in example_inputs(shape, "cpu")]
        if len({one[1:] for one in shapes}) > 1 or len(shapes[0]) < 2:
            raise ValueError(f"bench: expected --input of one image size, the batch size first, got {', '.join(shape)}")
        network, image = build_own(model, o.model_options(option)), shapes[0][1:]
        check_runs("bench", network, shape[0])
        batch = batch or [one[0] for one in shapes]
    elif shape or option:
        raise ValueError("bench: expected --input and --option with --model FILE.py:NAME alone, a model of your own")
    if readme and (model != "vgg19_cifar" or batch or sparsity):
        raise ValueError("bench: expected --readme without --model, --batch and --sparsity, which it sets")
    if threads is not None:
        torch.set_num_threads(threads)
    result = run_bench(
        model,
        sparsities=sparsity or (0.75, 0.875, 0.95),
        batches=batch or (1, 16, 128),
        block_shape=o.pair("--block-shape", block_shape),
        cases=README_CASES if readme else None,
        seconds=seconds,
        compile=compile,
        peers=peers,
        device=o.training_device(device),
        network=network,
        shape=image,
        recorded=recorded,
        say=o.say(as_json),
    )
    if as_json:
        o.print_json(result.as_dict())
    else:
        bench_table(result)


def reproduce(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package (slimnets), or a .yaml file.")] = "slimnets",
    data: Annotated[str | None, typer.Option(help="As in train; the preset smoke brings its own.")] = None,
    preset: Annotated[str, typer.Option(help="paper, device, cpu, smoke, or another of the recipe's.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder; RECIPE-PRESET by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Run every row with so many seeds.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Row or group (name or pattern) and what it needs; 'measure', 'report' (repeatable)."),
    ] = None,
    data_name: Annotated[str | None, typer.Option(help="How the report calls the data set.")] = None,
    compile: Annotated[bool, typer.Option(help="Also try torch.compile as the teacher's baseline.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Run a recipe step by step (finished steps are skipped), measure every network, write one report."""
    import torch

    from slimkernels.recipes.runner import reproduce as run_recipe

    if threads is not None:
        torch.set_num_threads(threads)
    folder = out or Path(f"{Path(recipe).stem}-{preset}")
    report = run_recipe(
        recipe,
        preset=preset,
        out=folder,
        data=data,
        data_name=data_name,
        seeds=seeds,
        only=only or (),
        device=o.training_device(device),
        compile=compile,
        progress=o.progress(as_json),
        say=o.say(as_json),
    )
    if as_json:
        o.print_json(report)
        return
    for verdict in report["verdicts"]:
        o.echo(f"{'yes' if verdict['holds'] else 'no ':3}  {verdict['text']}")
    o.echo(f"wrote {folder / 'report.md'}, report.json and {len(report['figures'])} pictures")
