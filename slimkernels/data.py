"""Images in memory: scikit-learn's digits, CIFAR-10, and folders of classes, decoded once, augmented on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Per-channel mean and deviation of CIFAR-10's training images, in [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

_DIGITS_TEST = 450  # a quarter of the 1797 images
_SPLIT_SEED = 0  # the split never depends on the caller's seed, so accuracies stay comparable


class TensorLoader:
    """Batches ``(images float32 (N, C, H, W), labels int64 (N,))`` of a data set that lies in memory.

    Order and augmentation of an epoch depend on ``(seed, epoch)`` alone: `set_epoch` makes any epoch repeatable, and
    without it every iteration is the next epoch.

    Args:
        images: uint8 (read as value / 255) or float, ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        batch_size: samples a batch.
        shuffle: a new order every epoch.
        seed: of order and augmentation.
        mean, std: per channel; images become ``(x - mean) / std``.
        crop_padding: pads by so many zero pixels (after normalisation) and crops back at a random place.
        flip: mirrors half of the images left to right.
        drop_last: leaves out a last batch smaller than the others, unless it is the only one.
        device: where the images are kept and augmented.
        classes: names of the labels.

    Raises:
        ValueError: shapes that do not fit, an empty data set, ``batch_size < 1``.
        TypeError: labels that are not int64.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        crop_padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        classes: Sequence[str] = (),
    ) -> None:
        if images.dim() != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "TensorLoader: expected images (N, C, H, W) and labels (N,), "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"TensorLoader: expected int64 labels, got {labels.dtype}")
        if len(images) == 0 or batch_size < 1:
            raise ValueError(
                f"TensorLoader: expected at least one image and batch_size >= 1, got {len(images)} and {batch_size}"
            )
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.crop_padding, self.flip, self.classes = crop_padding, flip, tuple(classes)
        self.drop_last = drop_last and len(images) >= batch_size
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self._epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def samples(self) -> int:
        """Number of images in the data set."""
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of ``epoch``."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._epoch) % 2**63)
        self._epoch += 1
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for batch in range(len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size].to(self.images.device)
            yield self._augmented(self._normalised(self.images[chosen]), generator), self.labels[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (scaled - self.mean) / self.std

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        device = images.device
        if self.crop_padding:
            pad = self.crop_padding
            dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).to(device)
            windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(n, device=device), :, dy, dx]
        if self.flip:
            mirrored = (torch.rand(n, generator=generator) < 0.5).to(device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


Loaders = tuple[TensorLoader, TensorLoader]


def digits_loaders(batch_size: int = 64, seed: int = 0, *, device: torch.device | str = "cpu") -> Loaders:
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
            images[train], labels[train], batch_size=batch_size, shuffle=True, seed=seed, drop_last=True, **common
        ),
        TensorLoader(images[test], labels[test], batch_size=256, **common),
    )


def cifar10_loaders(
    path: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> Loaders:
    """The lossless CIFAR-10 of torchvision in ``path``: 50 000 training and 10 000 test images ``(N, 3, 32, 32)``.

    Raises:
        FileNotFoundError: ``path`` does not hold it and ``download`` is False.
    """
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(path), train=split, download=download) for split in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"cifar10_loaders: expected CIFAR-10 (folder cifar-10-batches-py) in {path}, found none or a damaged one; "
            "download=True fetches it"
        ) from error
    arrays = [
        (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
        for split in (train, test)
    ]
    return _image_loaders(arrays[0], arrays[1], train.classes, batch_size, seed, augment, device)


def image_folder_loaders(
    path: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    device: torch.device | str = "cpu",
    threads: int = 4,
) -> Loaders:
    """Images in ``path/train/<class>/*`` and ``path/test/<class>/*`` (or ``val``), all of one size, decoded once.

    Normalised by CIFAR-10's statistics; ``augment`` crops with four pixels of padding and flips, on ``device``.

    Returns:
        ``(train_loader, test_loader)``.

    Raises:
        FileNotFoundError: a missing folder, or a class without images.
        ValueError: a file that is not an image or has another size (the file is named), or class folders of ``train``
            and ``test`` that differ.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"image_folder_loaders: expected a folder, got {root}, which does not exist")
    test_root = root / "test" if (root / "test").is_dir() else root / "val"
    for folder in (root / "train", test_root):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"image_folder_loaders: expected folders 'train' and 'test' (or 'val') in {root}, "
                f"found no {folder.name!r}"
            )
    train, classes = _decode(root / "train", None, threads)
    test, test_classes = _decode(test_root, tuple(train[0].shape[1:]), threads)
    if classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise ValueError(
            f"image_folder_loaders: expected the same classes in train and {test_root.name}, "
            f"got a difference: {differing}"
        )
    return _image_loaders(train, test, classes, batch_size, seed, augment, device)


def loaders(
    source: str | Path,
    batch_size: int = 128,
    seed: int = 0,
    *,
    augment: bool = True,
    device: torch.device | str = "cpu",
) -> Loaders:
    """Loaders of ``"digits"``, of a folder with torchvision's CIFAR-10, or of a folder ``{train,test}/<class>/*``."""
    if str(source) == "digits":
        return digits_loaders(batch_size, seed, device=device)
    if (Path(source) / "cifar-10-batches-py").is_dir():
        return cifar10_loaders(source, batch_size, seed, augment=augment, device=device)
    return image_folder_loaders(source, batch_size, seed, augment=augment, device=device)


def _image_loaders(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    batch_size: int,
    seed: int,
    augment: bool,
    device: torch.device | str,
) -> Loaders:
    common: dict[str, Any] = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "device": device, "classes": classes}
    return (
        TensorLoader(
            *train,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            crop_padding=4 if augment else 0,
            flip=augment,
            drop_last=True,
            **common,
        ),
        TensorLoader(*test, batch_size=512, **common),
    )


def _decode(folder: Path, shape: tuple[int, ...] | None, threads: int) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """``((images uint8 (N, 3, H, W), labels), classes)`` of every image under ``folder``, by name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    classes, index = find_classes(str(folder))
    samples = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS)
    files = [Path(file) for file, _ in samples]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        decoded = list(pool.map(_decode_file, files))
    expected = shape or tuple(decoded[0].shape)
    for file, image in zip(files, decoded, strict=True):
        if tuple(image.shape) != expected:
            size, wanted = (f"{s[2]}x{s[1]}" for s in (image.shape, expected))
            raise ValueError(f"image_folder_loaders: expected images of {wanted} pixels, got {size} in {file}")
    return (torch.stack(decoded), torch.tensor([label for _, label in samples])), classes


def _decode_file(file: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise ValueError(f"image_folder_loaders: expected an image, got an unreadable file {file} ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
