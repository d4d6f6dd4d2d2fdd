"""Batches of a data set that lies in memory, augmented where it lies.

Crop, flip and cutout are one gather: each output pixel's place in the batch is computed, the pixels are fetched and
normalised, and what fell outside the image or into a cutout is zeroed. Order and augmentation of a whole epoch are
drawn, and brought to the device, once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkernels.compress.training.processes import rank_rows

PADDING_MODES = ("zeros", "reflect")
# Share of a GPU's free memory that a data set may take; the rest is for training.
_SHARE_OF_FREE_MEMORY = 0.25


class TensorLoader:
    """Batches ``(images float32 (N, C, H, W) in channels_last, labels int64 (N,))``, on ``device``.

    Order and augmentation of an epoch depend on ``(seed, epoch)`` alone, sample by sample, whatever the batch size and
    the number of ranks: `set_epoch` makes any epoch repeatable, and without it every iteration is the next epoch.

    Args:
        images: uint8 (read as value / 255) or float, ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        batch_size: samples a batch.
        shuffle: a new order every epoch.
        seed: of order and augmentation.
        mean: per channel; images become ``(x - mean) / std``.
        std: per channel, see ``mean``.
        crop_padding: pads by so many pixels and crops back at a random place.
        padding_mode: "zeros" (after normalisation) or "reflect", which mirrors the image at its border.
        flip: True mirrors half of the images left to right, at random. "alternating" draws that once for each image, by
            the seed, and changes it every epoch, so that two epochs show both of its sides.
        cutout: zeroes a square of so many pixels around a random place (arXiv 1708.04552), cut at the border.
        drop_last: leaves out a last batch smaller than the others, unless it is the only one.
        with_indices: batches are ``(images, labels, indices)``, the last the samples' places in the data set, int64.
        device: where batches are made. The data set is kept there too if it fits a quarter of the free memory of a GPU;
            otherwise it stays on the host, from where a thread fetches the next batch ahead of time.
        classes: names of the labels.

    Raises:
        ValueError: shapes that do not fit, an empty data set, ``batch_size < 1``, negative padding or cutout, another
            padding mode or flip, reflected padding that is not smaller than the images.
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
        padding_mode: str = "zeros",
        flip: bool | str = False,
        cutout: int = 0,
        drop_last: bool = False,
        with_indices: bool = False,
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
        # As tensors name it: "cuda" is a tensor's cuda:0.
        self.device = torch.empty(0, device=device).device
        home = self.device if _fits(images, self.device) else torch.device("cpu")
        self.images = images.to(home).contiguous(memory_format=torch.channels_last)
        self.labels = labels.to(home)
        self.batch_size, self.shuffle, self.seed, self.with_indices = batch_size, shuffle, seed, with_indices
        self.classes = tuple(classes)
        self._set_augmentation("TensorLoader", crop_padding, padding_mode, flip, cutout)
        self.drop_last = drop_last and len(images) >= batch_size
        self.mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, -1, 1, 1)
        # (x * unit - mean) / std as x * scale + offset, one value for each element of a line
        unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
        lines = [
            part.expand(1, images.shape[1], 1, images.shape[3]) for part in (unit / self.std, -self.mean / self.std)
        ]
        self._scale, self._offset = (part[0, :, 0].T.reshape(-1) for part in lines)
        self._next_epoch = [0]  # in a list, so that shards count on with their loader
        self._rank, self._world = 0, 1

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def samples(self) -> int:
        """Number of images in the data set."""
        return len(self.images)

    def batch_samples(self, index: int) -> int:
        """Samples in batch ``index``, over all ranks."""
        return min(self.batch_size, len(self.images) - index * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of ``epoch``."""
        self._next_epoch[0] = epoch

    def augmented(
        self,
        *,
        crop_padding: int | None = None,
        padding_mode: str | None = None,
        flip: bool | str | None = None,
        cutout: int | None = None,
    ) -> TensorLoader:
        """The same loader with another augmentation; images and epoch are shared, None keeps what there is.

        For images of the size of CIFAR's, ``augmented(padding_mode="reflect", flip="alternating", cutout=8)`` is strong
        enough for a few dozen epochs.

        Raises:
            ValueError: as the constructor.
        """
        given = {"crop_padding": crop_padding, "padding_mode": padding_mode, "flip": flip, "cutout": cutout}
        settings: dict[str, Any] = {
            name: getattr(self, name) if value is None else value for name, value in given.items()
        }
        changed = copy.copy(self)
        changed._set_augmentation("augmented", **settings)
        return changed

    def _set_augmentation(self, op: str, crop_padding: int, padding_mode: str, flip: bool | str, cutout: int) -> None:
        if crop_padding < 0 or cutout < 0:
            raise ValueError(f"{op}: expected crop_padding >= 0 and cutout >= 0, got {crop_padding} and {cutout}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"{op}: expected padding_mode in {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        if flip not in (True, False, "alternating"):
            raise ValueError(f"{op}: expected flip to be True, False or 'alternating', got {flip!r}")
        smallest = min(self.images.shape[2:])
        if padding_mode == "reflect" and crop_padding >= smallest:
            raise ValueError(
                f"{op}: expected crop_padding below {smallest}, the images' smaller side, to reflect, "
                f"got {crop_padding}"
            )
        self.crop_padding, self.padding_mode, self.flip, self.cutout = crop_padding, padding_mode, flip, cutout

    def shard(self, rank: int, world: int) -> TensorLoader:
        """The same loader giving only this rank's rows of every batch; images and epoch are shared."""
        part = copy.copy(self)
        part._rank, part._world = rank, world
        return part

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        draws = self._draw(self._next_epoch[0])
        self._next_epoch[0] += 1
        if self.images.device == self.device:
            yield from (self._batch(draws, rows, None) for rows in self._rows())
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead: tuple[slice, Future[Any]] | None = None
            for rows in self._rows():
                fetching = pool.submit(self._fetch, draws.order_host[rows])
                if ahead is not None:
                    yield self._batch(draws, ahead[0], ahead[1].result())
                ahead = rows, fetching
            if ahead is not None:
                yield self._batch(draws, ahead[0], ahead[1].result())

    def _rows(self) -> Iterator[slice]:
        for index in range(len(self)):
            own = rank_rows(self.batch_samples(index), self._rank, self._world)
            yield slice(index * self.batch_size + own.start, index * self.batch_size + own.stop)

    def _draw(self, epoch: int) -> _Draws:
        """Everything random of an epoch, by the samples' positions in its order."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        count, (height, width) = len(self.images), self.images.shape[2:]
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shifts = mirrored = centres = None
        if self.crop_padding:
            shifts = torch.randint(-self.crop_padding, self.crop_padding + 1, (2, count, 1), generator=generator)
        if self.flip == "alternating":
            first = torch.rand(count, generator=torch.Generator().manual_seed(self.seed % 2**63)) < 0.5
            mirrored = (first ^ bool(epoch % 2))[order].unsqueeze(1)
        elif self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
        if self.cutout:
            centres = torch.stack([torch.randint(0, size, (count, 1), generator=generator) for size in (height, width)])
        moved = [part.to(self.device) if part is not None else None for part in (order, shifts, mirrored, centres)]
        return _Draws(order, *moved)

    def _fetch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, C) and labels of a host-side data set, in pinned memory."""
        images = self.images.permute(0, 2, 3, 1).index_select(0, chosen).pin_memory()
        return images, self.labels.index_select(0, chosen).pin_memory()

    def _batch(self, draws: _Draws, rows: slice, fetched: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        chosen = draws.order[rows]
        if fetched is None:
            stored, labels = (
                self.images.permute(0, 2, 3, 1).index_select(0, chosen),
                self.labels.index_select(0, chosen),
            )
        else:
            stored, labels = (part.to(self.device, non_blocking=True) for part in fetched)
        pixels, hidden = self._moved(stored, draws, rows)
        # Whole lines of width * channels: broadcasting along the 3 innermost elements is 9 times slower.
        n, height, width, channels = pixels.shape
        lines = torch.addcmul(self._offset, pixels.view(n, height, width * channels).float(), self._scale)
        if hidden is not None:
            lines.masked_fill_(hidden, 0.0)
        images = lines.view(n, height, width, channels).permute(0, 3, 1, 2)
        return (images, labels, chosen) if self.with_indices else (images, labels)

    def _moved(self, stored: Tensor, draws: _Draws, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Pixels (N, H, W, C) after crop and flip, and where (N, H, W * C) they have to be zeroed."""
        n, height, width, channels = stored.shape
        ys = torch.arange(height, device=self.device).expand(n, height)
        xs = torch.arange(width, device=self.device).expand(n, width)
        hidden = None
        if draws.centres is not None:
            # offset by half a pixel for an even square, so that it has `cutout` pixels a side
            down, right = draws.centres[:, rows]
            half = self.cutout // 2
            in_rows = (ys >= down - half) & (ys < down - half + self.cutout)
            in_columns = (xs >= right - half) & (xs < right - half + self.cutout)
            hidden = in_rows.unsqueeze(2) & in_columns.repeat_interleave(channels, 1).unsqueeze(1)
        if draws.mirrored is not None:
            xs = torch.where(draws.mirrored[rows], width - 1 - xs, xs)
        if draws.shifts is not None:
            ys, xs = ys + draws.shifts[0, rows], xs + draws.shifts[1, rows]
        if draws.shifts is not None and self.padding_mode == "reflect":
            ys, xs = _reflected(ys, height), _reflected(xs, width)
        elif draws.shifts is not None:
            outside_y, outside_x = (ys < 0) | (ys >= height), (xs < 0) | (xs >= width)
            outside = outside_y.unsqueeze(2) | outside_x.repeat_interleave(channels, 1).unsqueeze(1)
            hidden = outside if hidden is None else hidden | outside
            ys, xs = ys.clamp(0, height - 1), xs.clamp(0, width - 1)
        if draws.mirrored is not None or draws.shifts is not None:
            lines = torch.arange(0, n * height, height, device=self.device).view(-1, 1) + ys
            index = (lines.unsqueeze(2) * width + xs.unsqueeze(1)).view(-1)
            stored = stored.view(-1, channels).index_select(0, index).view(n, height, width, channels)
        return stored, hidden


@dataclass(frozen=True)
class _Draws:
    """Of one epoch, by position: the sample (on the host and on the device), and on the device the crop's shift
    (2, N, 1), whether it is mirrored (N, 1), and the cutout's centre (2, N, 1)."""

    order_host: Tensor
    order: Any
    shifts: Any
    mirrored: Any
    centres: Any


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places up to ``size - 1`` outside of the image, mirrored at its first and its last pixel."""
    return size - 1 - (size - 1 - places.abs()).abs()


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.numel() * images.element_size() <= _SHARE_OF_FREE_MEMORY * free
