"""Training and test loaders by data set: digits, CIFAR-10, CIFAR-100, folders and archives of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.data.decoded import decode
from slimkernels.data.tensor_loader import TensorLoader

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
"""Mean of CIFAR-10's training images in [0, 1], per channel."""
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
"""Standard deviation of CIFAR-10's training images in [0, 1], per channel."""
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
"""Mean of CIFAR-100's training images in [0, 1], per channel."""
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
"""Standard deviation of CIFAR-100's training images in [0, 1], per channel."""

_DIGITS_TEST = 450  # a quarter of the 1797 images
_SPLIT_SEED = 0  # the split never depends on the caller's seed, so accuracies stay comparable
_TEST_BATCH = 512

Loaders = tuple[TensorLoader, TensorLoader]
"""A loader of the training data and one of the test data."""


def digits_loaders(
    batch_size: int = 64, seed: int = 0, *, device: torch.device | str = "cpu", with_indices: bool = False
) -> Loaders:
    """scikit-learn's real handwritten digits (UCI, 1797 images of 8x8), normalised: 1347 to train on, 450 to test on.

    The split is fixed and stratified; ``seed`` orders the training batches only. Nothing is downloaded.

    Returns:
        ``(train_loader, test_loader)`` of images ``(N, 1, 8, 8)`` and labels 0..9.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16.0
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=_DIGITS_TEST, stratify=bunch.target, random_state=_SPLIT_SEED
    )
    mean, std = float(images[train].mean()), float(images[train].std())
    common: dict[str, Any] = {"mean": (mean,), "std": (std,), "device": device, "classes": [str(i) for i in range(10)]}
    return (
        TensorLoader(
            images[train],
            labels[train],
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            drop_last=True,
            with_indices=with_indices,
            **common,
        ),
        TensorLoader(images[test], labels[test], batch_size=256, **common),
    )


def cifar10_loaders(
    path: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    cutout: int = 0,
    download: bool = False,
    device: torch.device | str = "cpu",
    with_indices: bool = False,
) -> Loaders:
    """The lossless CIFAR-10 of torchvision in ``path``: 50 000 training and 10 000 test images ``(N, 3, 32, 32)``.

    Raises:
        FileNotFoundError: ``path`` does not hold it and ``download`` is False.
    """
    from torchvision.datasets import CIFAR10

    statistics = (CIFAR10_MEAN, CIFAR10_STD)
    return _cifar_loaders(
        "cifar10_loaders", CIFAR10, statistics, path, download, batch_size, seed, augment, cutout, device, with_indices
    )


def cifar100_loaders(
    path: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    cutout: int = 0,
    download: bool = False,
    device: torch.device | str = "cpu",
    with_indices: bool = False,
) -> Loaders:
    """torchvision's CIFAR-100 in ``path``: 50 000 training and 10 000 test images ``(N, 3, 32, 32)`` of 100 classes.

    Raises:
        FileNotFoundError: ``path`` does not hold it and ``download`` is False.
    """
    from torchvision.datasets import CIFAR100

    statistics = (CIFAR100_MEAN, CIFAR100_STD)
    return _cifar_loaders(
        "cifar100_loaders",
        CIFAR100,
        statistics,
        path,
        download,
        batch_size,
        seed,
        augment,
        cutout,
        device,
        with_indices,
    )


def image_folder_loaders(
    path: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    cutout: int = 0,
    size: int | None = None,
    device: torch.device | str = "cpu",
    with_indices: bool = False,
    threads: int = 4,
    cache: bool = True,
    progress: bool = True,
) -> Loaders:
    """Images in ``path/train/<class>/*`` and ``path/test/<class>/*`` (or ``val``), or in a tar archive of these.

    Decoded once: the pixels are kept in a cache file (`decoded`), so that only the first call takes long. Normalised by
    CIFAR-10's statistics; ``augment`` crops with an eighth of the height as padding and flips, on ``device``.

    Args:
        cutout: side of the square that is zeroed in training images, 0 for none.
        size: scales and crops every image to ``size x size``; None: all images have one size.
        with_indices: training batches carry the samples' indices.

    Returns:
        ``(train_loader, test_loader)``.

    Raises:
        FileNotFoundError: a missing folder, or a split without images.
        ValueError: a file that is not an image or has another size (the file is named), or class folders of ``train``
            and ``test`` that differ.
    """
    decoded = decode("image_folder_loaders", Path(path), size=size, threads=threads, cache=cache, progress=progress)
    splits = [(split.images, split.labels) for split in (decoded.train, decoded.test)]
    statistics = (CIFAR10_MEAN, CIFAR10_STD)
    return _image_loaders(splits, decoded.classes, statistics, batch_size, seed, augment, cutout, device, with_indices)


def loaders_for(
    source: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    cutout: int = 0,
    size: int | None = None,
    device: torch.device | str = "cpu",
    with_indices: bool = False,
    download: bool = False,
    progress: bool = True,
) -> Loaders:
    """Loaders of a data set by name or by what lies at a path.

    Args:
        source: ``"digits"``; ``"cifar10"`` or ``"cifar100"`` (torchvision's, kept in the cache folder, fetched with
            ``download=True``); a folder that holds torchvision's CIFAR-10 or CIFAR-100; a folder or tar archive
            ``{train,test}/<class>/*``.
        size: as `image_folder_loaders` takes it, for folders and archives of images alone.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: what `image_folder_loaders` refuses; ``size`` for a data set whose images have one size.
    """
    common: dict[str, Any] = {"augment": augment, "cutout": cutout, "device": device, "with_indices": with_indices}
    named = {"cifar10": cifar10_loaders, "cifar100": cifar100_loaders}
    opened: Callable[[], Loaders]
    if str(source) == "digits":
        opened = partial(digits_loaders, batch_size, seed, device=device, with_indices=with_indices)
    elif str(source) in named and not Path(source).exists():
        root = env.cache_dir() / "data"
        opened = partial(named[str(source)], root, batch_size, seed, download=download, **common)
    elif (Path(source) / "cifar-10-batches-py").is_dir():
        opened = partial(cifar10_loaders, source, batch_size, seed, **common)
    elif (Path(source) / "cifar-100-python").is_dir():
        opened = partial(cifar100_loaders, source, batch_size, seed, **common)
    else:
        return image_folder_loaders(source, batch_size, seed, size=size, progress=progress, **common)
    if size is not None:
        raise ValueError(f"loaders_for: expected size=None for {source}, whose images have one size, got {size}")
    return opened()


def _cifar_loaders(
    op: str,
    data_set: Any,
    statistics: tuple[Sequence[float], Sequence[float]],
    path: str | Path,
    download: bool,
    batch_size: int,
    seed: int,
    augment: bool,
    cutout: int,
    device: torch.device | str,
    with_indices: bool,
) -> Loaders:
    try:
        train, test = (data_set(str(path), train=split, download=download) for split in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{op}: expected {data_set.__name__} (folder {data_set.base_folder}) in {path}, found none or a damaged "
            "one; download=True fetches it"
        ) from error
    splits = [
        (torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)) for split in (train, test)
    ]
    return _image_loaders(splits, train.classes, statistics, batch_size, seed, augment, cutout, device, with_indices)


def _image_loaders(
    splits: Sequence[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    statistics: tuple[Sequence[float], Sequence[float]],
    batch_size: int,
    seed: int,
    augment: bool,
    cutout: int,
    device: torch.device | str,
    with_indices: bool,
) -> Loaders:
    train, test = splits
    common: dict[str, Any] = {"mean": statistics[0], "std": statistics[1], "device": device, "classes": classes}
    return (
        TensorLoader(
            *train,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            crop_padding=train[0].shape[2] // 8 if augment else 0,
            flip=augment,
            cutout=cutout if augment else 0,
            drop_last=True,
            with_indices=with_indices,
            **common,
        ),
        TensorLoader(*test, batch_size=_TEST_BATCH, **common),
    )
