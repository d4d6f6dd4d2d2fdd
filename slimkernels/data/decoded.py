"""Images of a folder or an archive as one tensor per split, decoded once and kept in a cache file.

The cache is a safetensors file in `env.cache_dir`, found again by a fingerprint of the source: every image's name, size
and time of change, or those of the archive. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")
_TEST_SPLITS = ("test", "val")
_CACHE_FORMAT = "3"


@dataclass(frozen=True)
class Split:
    """``images`` uint8 ``(N, 3, H, W)``, channels_last; ``labels`` int64 ``(N,)``; ordered by class and file name."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Decoded:
    """The two splits of a data set and the names of its classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def decode(
    op: str, source: Path, *, size: int | None = None, threads: int = 4, cache: bool = True, progress: bool = True
) -> Decoded:
    """Every image of ``{train,test}/<class>/*`` (or ``val``) in a folder or a tar archive.

    Args:
        op: begins every message.
        source: the folder, or an archive with these folders at any depth.
        size: scales the shorter side to so many pixels and crops the centre; None: all images have one size.
        threads: decode at the same time.
        cache: read and write the cache file.
        progress: a bar on stderr while decoding, if that is a terminal.

    Raises:
        FileNotFoundError: a missing source or split, or a split without images.
        ValueError: a file that is not an image, has another size, or values of more than 16 bits (it is named), classes
            of the splits that differ, ``size`` below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"{op}: expected size >= 1 or None, got {size}")
    if not source.exists():
        raise FileNotFoundError(f"{op}: expected a folder or an archive, got {source}, which does not exist")
    archive = source.is_file()
    if archive and not source.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{op}: expected a folder or one of {', '.join(ARCHIVE_SUFFIXES)}, got {source}")
    files = None if archive else _folder_files(op, source)
    print_of = _fingerprint(source, files, size)
    path = env.cache_dir() / "data" / f"{print_of}.safetensors"
    if cache and (found := _read_cache(path, print_of)) is not None:
        return found
    names, read = (
        _archive_names(op, source)
        if files is None
        else ([name for name, _ in files], _folder_reader(source, [name for name, _ in files]))
    )
    decoded = _decode(op, source, names, read, size, threads, progress)
    if cache:
        _write_cache(path, print_of, decoded)
    return decoded


def _folder_files(op: str, root: Path) -> list[tuple[str, os.stat_result]]:
    """(path below ``root``, stat) of every image, sorted."""
    test = next((name for name in _TEST_SPLITS if (root / name).is_dir()), _TEST_SPLITS[-1])
    found: list[tuple[str, os.stat_result]] = []
    for split in ("train", test):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"{op}: expected folders 'train' and 'test' (or 'val') in {root}, found no {split!r}"
            )
        with os.scandir(root / split) as classes:
            folders = sorted(entry.name for entry in classes if entry.is_dir())
        for folder in folders:
            found += sorted(_below(op, root / split / folder, f"{split}/{folder}"), key=lambda item: item[0])
    return found


def _below(op: str, folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                yield from _below(op, folder / entry.name, name)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{op}: expected an image, got {entry.path}, which is no regular file")
                yield name, status


def _fingerprint(source: Path, files: Iterable[tuple[str, os.stat_result]] | None, size: int | None) -> str:
    digest = hashlib.sha256(os.fsencode(f"{_CACHE_FORMAT} {size} {source.resolve()}\n"))
    for name, status in files if files is not None else [("", source.stat())]:
        digest.update(os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:32]


def _folder_reader(root: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes | Path]]:
    return ((name, root / name) for name in names)


def _archive_names(op: str, source: Path) -> tuple[list[str], Iterator[tuple[str, bytes | Path]]]:
    """Names of the images as ``split/class/file``, and an iterator over names and contents, in the same order."""
    import tarfile

    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                at = next((i for i, part in enumerate(parts) if part in ("train", *_TEST_SPLITS)), None)
                if at is None or len(parts) < at + 3 or not parts[-1].lower().endswith(IMAGE_SUFFIXES):
                    continue
                if member.isdir():
                    continue
                try:  # of a link the content of what it names
                    file = tar.extractfile(member)
                except (KeyError, RecursionError):
                    file = None
                if file is None:
                    raise ValueError(f"{op}: expected an image, got {member.name} in {source}, which is no file there")
                contents["/".join(parts[at:])] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{op}: expected a tar archive, got an unreadable file {source} ({error})") from error
    test = next((split for split in _TEST_SPLITS if any(name.startswith(f"{split}/") for name in contents)), "")
    taken = [name for name in contents if name.split("/")[0] in ("train", test)]
    names = sorted(taken, key=lambda name: (name.split("/")[1], name))
    return names, ((name, contents[name]) for name in names)


def _decode(
    op: str,
    source: Path,
    names: Sequence[str],
    read: Iterator[tuple[str, bytes | Path]],
    size: int | None,
    threads: int,
    progress: bool,
) -> Decoded:
    test_name = next((split for split in _TEST_SPLITS if any(n.startswith(f"{split}/") for n in names)), "test")
    classes = {
        split: sorted({name.split("/")[1] for name in names if name.startswith(f"{split}/")})
        for split in ("train", test_name)
    }
    for split, found in classes.items():
        if not found:
            raise FileNotFoundError(f"{op}: expected images in {split}/<class>/ of {source}, found none")
    if classes["train"] != classes[test_name]:
        differing = sorted(set(classes["train"]) ^ set(classes[test_name]))
        raise ValueError(f"{op}: expected the same classes in train and {test_name}, got a difference: {differing}")
    index = {name: label for label, name in enumerate(classes["train"])}
    images: dict[str, list[Tensor]] = {"train": [], test_name: []}
    labels: dict[str, list[int]] = {"train": [], test_name: []}
    expected: tuple[int, ...] | None = None
    with ThreadPoolExecutor(max_workers=threads) as pool, _bar(progress, len(names)) as advance:
        for name, image in pool.map(lambda item: (item[0], _pixels(op, source, item[0], item[1], size)), read):
            expected = expected or tuple(image.shape)
            if tuple(image.shape) != expected:
                got, wanted = (f"{shape[1]}x{shape[0]}" for shape in (image.shape, expected))
                raise ValueError(
                    f"{op}: expected images of {wanted} pixels, or a size to scale all to (size=, --image-size), "
                    f"got {got} in {source / name}"
                )
            split, label = name.split("/")[:2]
            images[split].append(image)
            labels[split].append(index[label])
            advance()
    train, test = (
        Split(torch.stack(images[split]).permute(0, 3, 1, 2), torch.tensor(labels[split]))
        for split in ("train", test_name)
    )
    return Decoded(train, test, tuple(classes["train"]))


def _pixels(op: str, source: Path, name: str, content: bytes | Path, size: int | None) -> Tensor:
    """One image as uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            colour = _eight_bits(image).convert("RGB")
            if size is not None:
                colour = ImageOps.fit(colour, (size, size), method=Image.Resampling.BILINEAR)
            pixels = np.array(colour)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise ValueError(f"{op}: expected an image, got an unreadable file {source / name} ({error})") from error
    return torch.from_numpy(pixels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, as Pillow itself reads 16-bit colour; its `convert` cuts grey values off at 255.

    Raises:
        ValueError: numbers whose range the file does not say.
    """
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"values of 32 bits (mode {image.mode}), whose range is not known; save it with 8 or 16")
    return image


def _read_cache(path: Path, fingerprint: str) -> Decoded | None:
    """The cached data set; None if there is none or it is damaged, which decoding again repairs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            train, test = (
                Split(file.get_tensor(f"{split}.images").permute(0, 3, 1, 2), file.get_tensor(f"{split}.labels").long())
                for split in ("train", "test")
            )
            classes = tuple(json.loads(metadata["classes"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    whole = all(
        part.images.dtype == torch.uint8 and part.images.dim() == 4 and len(part.images) == len(part.labels)
        for part in (train, test)
    )
    return Decoded(train, test, classes) if whole else None


def _write_cache(path: Path, fingerprint: str, decoded: Decoded) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        "train.images": decoded.train.images.permute(0, 2, 3, 1),
        "train.labels": decoded.train.labels,
        "test.images": decoded.test.images.permute(0, 2, 3, 1),
        "test.labels": decoded.test.labels,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(
                tensors, str(temporary), metadata={"fingerprint": fingerprint, "classes": json.dumps(decoded.classes)}
            )
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"slimkernels: the decoded images could not be cached in {path} ({error}); the next call decodes again",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def _bar(enabled: bool, total: int) -> Iterator[Callable[[], None]]:
    if not enabled or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.update(task, advance=1)
