"""``slimkernels eval``: the accuracy of weights or of a converted file on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkernels.cli import options as o


def evaluate(
    file: Annotated[
        Path | None, typer.Argument(help="A .slim.safetensors file, or weights; none with a --model that brings them.")
    ] = None,
    data: o.Data = "digits",
    image_size: o.ImageSize = None,
    model: o.AnyModel = None,
    shape: Annotated[
        str | None,
        typer.Option("--input", help="Batch that the model takes, as in 64,3,32,32; the images must be of its size."),
    ] = None,
    option: o.ModelOption = None,
    num_classes: o.Classes = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a batch; 64 by default.")] = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Show the accuracy of a model on the test images of a data set."""
    from slimkernels import models
    from slimkernels.checkpoint import load
    from slimkernels.cli.own_model import build_own, example_inputs, is_own, open_model
    from slimkernels.compress.training.train import evaluate as run_evaluate

    device, keywords = o.training_device(device), o.model_options(option)
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"eval: expected a file, got {file}, which does not exist")
    if file is not None and file.name.endswith(".slim.safetensors"):
        into = None
        if is_own(model):
            assert model is not None
            into = build_own(model, keywords)
        elif model is not None:
            into = models.build(model, num_classes or models.default_classes(model), **keywords)
        network = load(file, into=into)
    else:
        network = open_model("eval", file, model, num_classes, keywords).network
    wanted = None if shape is None else tuple(example_inputs([shape], "cpu")[0].shape)
    _, test_loader = o.data_loaders(data, batch_size or (64 if wanted is None else wanted[0]), 0, device, image_size)
    if wanted is not None and tuple(test_loader.images.shape[1:]) != wanted[1:]:
        got = "x".join(map(str, test_loader.images.shape[1:]))
        raise ValueError(
            f"eval: expected images of {'x'.join(map(str, wanted[1:]))} as --input says, got {got} in {data}"
        )
    o.check_images("eval", network.to(device), test_loader, data)
    accuracy = run_evaluate(network, test_loader)
    if as_json:
        o.print_json(
            {"file": None if file is None else str(file), "model": model, "data": data, "accuracy": accuracy,
             "images": test_loader.samples}
        )  # fmt: skip
        return
    o.echo(f"accuracy {accuracy:.2%} on {test_loader.samples} test images of {data}")
