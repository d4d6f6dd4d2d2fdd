"""Data sets as commands and recipes spell them: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, a folder or archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkernels.data import Loaders, cifar10_loaders, cifar100_loaders, loaders_for

# The classes of CIFAR-10 as torchvision and its image folders spell them, and its number of training images.
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_TRAINING = 50_000
_NAMED = {"cifar10": cifar10_loaders, "cifar100": cifar100_loaders}
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "scikit-learn digits"}


def open_data(
    spec: str, batch_size: int, seed: int = 0, *, size: int | None = None, device: Any = "cpu", progress: bool = True
) -> Loaders:
    """Training and test loader of ``spec``.

    ``cifar10:DIR`` and ``cifar100:DIR`` are torchvision's data sets in DIR, fetched into it where it lacks them; the
    rest, and ``size``, is as `slimkernels.data.loaders_for` takes it.

    Raises:
        OSError: nothing there. ValueError: an unreadable image (named), or folders that do not fit together.
    """
    kind, colon, folder = spec.partition(":")
    if colon and kind in _NAMED:
        if size is not None:
            raise ValueError(f"--image-size: expected none for {spec}, whose images have one size, got {size}")
        if not folder:
            raise ValueError(f"--data: expected a folder as in {kind}:DIR, got {spec!r}")
        archive = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
        missing = not (Path(folder) / archive).is_dir()
        try:
            return _NAMED[kind](folder, batch_size, seed, download=missing, device=device)
        except OSError as error:
            if not missing or isinstance(error, FileNotFoundError):
                raise
            raise OSError(
                f"--data: expected {spec} to hold the folder {archive}, got none, and fetching it failed ({error}); "
                f"put {archive} there yourself, or use --data digits, which needs no network"
            ) from error
    return loaders_for(spec, batch_size, seed, size=size, device=device, progress=progress)


def data_title(spec: str, found: Loaders) -> str:
    """What a report calls the data set: lossless and JPEG copies of CIFAR-10 give different accuracies."""
    kind = spec.partition(":")[0]
    if kind in _TITLES:
        return _TITLES[kind]
    train = found[0]
    path = Path(spec)
    if tuple(sorted(train.classes)) == _CIFAR10 and train.samples == _CIFAR10_TRAINING:
        lossless = (path / "cifar-10-batches-py").is_dir() or _suffix(path) in (".png", ".bmp")
        return "CIFAR-10" if lossless else "CIFAR-10 (JPEG copy)"
    return path.name


def _suffix(folder: Path) -> str:
    """Of one of the training images in a folder; empty where there is none, as in an archive."""
    files = (
        (file for file in (folder / "train").rglob("*") if file.is_file()) if (folder / "train").is_dir() else iter(())
    )
    return next((file.suffix.lower() for file in files), "")
