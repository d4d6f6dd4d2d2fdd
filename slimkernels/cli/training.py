"""``slimkernels train`` and ``distill``, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimkernels.cli import options as o

if TYPE_CHECKING:
    from slimkernels.compress.training.callbacks import Callback


def train(
    model: Annotated[str, typer.Option(help="This package's or torchvision's name of a model.")] = "vgg_digits",
    option: o.ModelOption = None,
    data: o.Data = "digits",
    image_size: o.ImageSize = None,
    out: Annotated[Path | None, typer.Option(help="Weights to write; MODEL.safetensors by default.")] = None,
    epochs: o.Epochs = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: o.BatchSize = 64,
    optimizer: o.Optimizer = "sgd",
    schedule: o.Schedule = "onecycle",
    warmup_epochs: o.Warmup = 0.0,
    weight_decay: o.WeightDecay = 5e-4,
    label_smoothing: o.LabelSmoothing = 0.0,
    clip_norm: o.ClipNorm = None,
    accumulate: o.Accumulate = 1,
    precision: o.Precision = "fp32",
    ema: o.Ema = None,
    compile: o.Compile = False,
    deterministic: o.Deterministic = False,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    log_dir: o.LogDir = None,
    as_json: o.Json = False,
) -> None:
    """Train a dense model and write its weights."""
    import torch

    from slimkernels import models
    from slimkernels.compress.training.train import TrainConfig, fine_tune

    o.check_resume(resume, checkpoint)
    config = TrainConfig(
        epochs,
        lr,
        optimizer,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        clip_norm=clip_norm,
        accumulate=accumulate,
        precision=precision,
        ema_decay=ema,
        compile=compile,
        deterministic=deterministic,
        seed=seed,
    )
    target = o.check_writable(out or Path(f"{model}.safetensors"))
    device, keywords = o.training_device(device), o.model_options(option)
    train_loader, test_loader = o.data_loaders(data, batch_size, seed, device, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.build(model, len(train_loader.classes), **keywords).to(device)
    o.check_images("train", network, test_loader, data)
    history = fine_tune(
        network,
        train_loader,
        test_loader,
        config,
        progress=o.progress(as_json),
        checkpoint=checkpoint,
        resume=resume,
        log_dir=log_dir,
    )
    o.finish_training(network, model, target, history, as_json, len(train_loader.classes), keywords)


def distill(
    teacher: Annotated[Path, typer.Argument(help="Weights of the teacher.")],
    student: Annotated[str, typer.Option(help="Name of the student model.")] = "nin_cifar",
    option: o.ModelOption = None,
    student_weights: Annotated[Path | None, typer.Option(help="Weights the student starts from.")] = None,
    model: o.Model = None,
    data: o.Data = "digits",
    image_size: o.ImageSize = None,
    out: Annotated[
        Path | None, typer.Option(help="Weights to write; STUDENT.distilled.safetensors by default.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Name of the distillation loss, such as kd.")] = "kd",
    temperature: Annotated[float, typer.Option(help="T of the soft targets.")] = 4.0,
    soft_weight: Annotated[float, typer.Option(help="Share of the soft loss.")] = 0.7,
    sparsity: Annotated[float, typer.Option(help="Prune this share of the blocks meanwhile; 0 prunes nothing.")] = 0.0,
    block_shape: o.BlockShape = "16x1",
    scope: Annotated[str, typer.Option(help="layer or global: where blocks are ranked against each other.")] = "layer",
    quantize: o.Quantize = None,
    quantize_begin: o.QuantizeBegin = 0.6,
    epochs: o.Epochs = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: o.BatchSize = 64,
    optimizer: o.Optimizer = "sgd",
    schedule: o.Schedule = "onecycle",
    warmup_epochs: o.Warmup = 0.0,
    weight_decay: o.WeightDecay = 5e-4,
    label_smoothing: o.LabelSmoothing = 0.0,
    clip_norm: o.ClipNorm = None,
    accumulate: o.Accumulate = 1,
    precision: o.Precision = "fp32",
    ema: o.Ema = None,
    compile: o.Compile = False,
    deterministic: o.Deterministic = False,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    log_dir: o.LogDir = None,
    as_json: o.Json = False,
) -> None:
    """Train a student against a teacher's soft labels, pruning it gradually if --sparsity is given, and rounding its
    weights in the end if --quantize is."""
    import torch

    from slimkernels import models
    from slimkernels.cli.weights import load_model
    from slimkernels.compress.distillation.distill import distill as run_distill
    from slimkernels.compress.pruning.gradual import GradualPruning
    from slimkernels.compress.pruning.prune import finalize_
    from slimkernels.compress.quantization import QuantizationAware
    from slimkernels.compress.training.train import TrainConfig

    o.check_resume(resume, checkpoint)
    callbacks: list[Callback] = []
    if sparsity:
        callbacks.append(GradualPruning(sparsity, o.pair("--block-shape", block_shape), scope=scope))
    if quantize is not None:
        callbacks.append(QuantizationAware(quantize, begin=quantize_begin))
    config = TrainConfig(
        epochs,
        lr,
        optimizer,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        clip_norm=clip_norm,
        accumulate=accumulate,
        precision=precision,
        ema_decay=ema,
        compile=compile,
        deterministic=deterministic,
        seed=seed,
    )
    target = o.check_writable(out or Path(f"{student}.distilled.safetensors"))
    device, keywords = o.training_device(device), o.model_options(option)
    teacher_model, _, classes, _ = load_model(teacher, model)
    if student_weights is not None:
        network, student, _, description = load_model(student_weights, student, options=keywords)
        keywords = dict(description.options) or keywords
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = models.build(student, classes, **keywords)
    train_loader, test_loader = o.data_loaders(data, batch_size, seed, device, image_size)
    for one in (network.to(device), teacher_model.to(device)):
        o.check_images("distill", one, test_loader, data)
    history = run_distill(
        network,
        teacher_model,
        train_loader,
        test_loader,
        config,
        loss=loss,
        temperature=temperature,
        soft_weight=soft_weight,
        callbacks=callbacks,
        progress=o.progress(as_json),
        checkpoint=checkpoint,
        resume=resume,
        log_dir=log_dir,
    )
    o.finish_training(finalize_(network), student, target, history, as_json, len(train_loader.classes), keywords)
