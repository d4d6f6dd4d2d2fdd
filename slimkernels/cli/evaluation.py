"""``slimkernels eval``: the accuracy of weights or of a converted file on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkernels.cli import options as o


def evaluate(
    file: Annotated[Path, typer.Argument(help="A .slim.safetensors file, or weights.")],
    data: o.Data = "digits",
    model: Annotated[
        str | None, typer.Option(help="Name of the model, or FILE.py:NAME, where the file does not carry it.")
    ] = None,
    option: o.ModelOption = None,
    num_classes: o.Classes = None,
    batch_size: o.BatchSize = 64,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Show the accuracy of a model on the test images of a data set."""
    from slimkernels import models
    from slimkernels.checkpoint import load
    from slimkernels.cli.own_model import build_own, is_own
    from slimkernels.cli.weights import load_model
    from slimkernels.compress.training.train import evaluate as run_evaluate

    device, keywords = o.training_device(device), o.model_options(option)
    if not file.is_file():
        raise FileNotFoundError(f"eval: expected a file, got {file}, which does not exist")
    converted = file.name.endswith(".slim.safetensors")
    if is_own(model):
        assert model is not None
        network = build_own(model, keywords, None if converted else file)
        network = load(file, into=network) if converted else network
    elif converted:
        into = None
        if model is not None:
            into = models.build(model, num_classes or models.default_classes(model), **keywords)
        network = load(file, into=into)
    else:
        network = load_model(file, model, num_classes, options=keywords)[0]
    _, test_loader = o.data_loaders(data, batch_size, 0, device)
    accuracy = run_evaluate(network.to(device), test_loader)
    if as_json:
        o.print_json({"file": str(file), "data": data, "accuracy": accuracy, "images": test_loader.samples})
        return
    o.echo(f"accuracy {accuracy:.2%} on {test_loader.samples} test images of {data}")
