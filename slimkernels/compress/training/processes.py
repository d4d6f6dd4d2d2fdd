"""One process or several: the accelerate session of a run, rank-sharded batches, state made equal on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkernels.compress.training.evaluation import Loader, checked_batch, count_correct, reseed

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@contextmanager
def session(name: str, device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An `Accelerator` for a model on ``device``: gloo between processes on the CPU, NCCL between GPUs.

    accelerate keeps its state in the process; the caller's, if any, is set aside for the duration of the block, so that
    one process can run trainings of different precisions. A process group stays open for the next one.

    Raises:
        ValueError: fp16 on the CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(f"{name}: expected precision 'fp32' or 'bf16' for a model on the CPU, got 'fp16'")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    stores = [AcceleratorState._shared_state, PartialState._shared_state, GradientState._shared_state]
    own = [dict(store) for store in stores]
    for store in stores:
        store.clear()
    try:
        yield Accelerator(device_placement=False, mixed_precision=_PRECISION[precision], cpu=device.type == "cpu")
    finally:
        for store, content in zip(stores, own, strict=True):
            store.clear()
            store.update(content)


@torch.no_grad()
def equalise(module: nn.Module, *, buffers_only: bool = False) -> None:
    """Gives every rank rank 0's parameters and buffers."""
    tensors = list(module.buffers()) if buffers_only else [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), src=0)


def check_undivided(name: str, loader: Any) -> None:
    """Refuses a loader whose sampler gives every rank its own part already: its batches are divided here.

    Raises:
        ValueError: it would leave all but ``1 / world`` of the samples out; the message begins with ``name``.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, torch.utils.data.DistributedSampler) and sampler.num_replicas > 1:
        raise ValueError(
            f"{name}: expected a loader of all samples, which are divided between the processes here, got one with a "
            "DistributedSampler; leave the sampler out, and let batch_size be that of all processes together"
        )


class RankBatches:
    """Every batch of a loader, cut into as many near-equal slices as there are ranks; iterating gives this rank's.

    What is iterated are pairs of a batch and its weight, ``samples * world / samples of the whole batch``: the mean of
    the ranks' weighted mean losses is the mean loss of the whole batch. A `data.TensorLoader` and a DataLoader with
    sampled batches load only their slice; any other loader gives each rank everything, to be sliced here.

    Args:
        name: of the training that every rank needs a sample of every batch for, the begin of its message. None where
            they are for evaluation: a rank without a share of a batch then goes on to the next.

    Raises:
        ValueError: a training batch with fewer samples than ranks; on all of them, before the rank loads its share.
    """

    def __init__(self, loader: Loader, rank: int, world: int, name: str | None = None) -> None:
        self.loader, self.rank, self.world, self.name = loader, rank, world, name

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        if self.world == 1:
            yield from ((batch, 1.0) for batch in self.loader)
            return
        sizes: deque[int] = deque()
        for batch in self._slices(sizes):
            whole = sizes.popleft()
            if len(batch[1]) > 0:
                yield batch, len(batch[1]) * self.world / whole

    def _slices(self, sizes: deque[int]) -> Iterator[Any]:
        loader: Any = self.loader
        if hasattr(loader, "shard"):
            sizes.extend(self._enough(loader.batch_samples(index)) for index in range(len(loader)))
            yield from loader.shard(self.rank, self.world)
        elif type(loader) is torch.utils.data.DataLoader and loader.batch_sampler is not None:
            yield from _sliced_dataloader(loader, self, sizes)
        else:
            for batch in loader:
                checked_batch(self.name or "evaluate", batch)
                sizes.append(self._enough(len(batch[1])))
                rows = rank_rows(len(batch[1]), self.rank, self.world)
                yield tuple(part[rows] for part in batch)

    def _enough(self, samples: int) -> int:
        """``samples`` of a whole batch, where every rank that needs one gets one."""
        if self.name is not None and samples < self.world:
            raise ValueError(
                f"{self.name}: expected training batches of at least {self.world} samples, one for each process, got "
                f"{samples}; set drop_last=True or another batch_size"
            )
        return samples


def rank_rows(samples: int, rank: int, world: int) -> slice:
    """The rows of a batch of ``samples`` that belong to ``rank``: contiguous, sizes differing by at most one."""
    return slice(samples * rank // world, samples * (rank + 1) // world)


class _SlicedSampler:
    """A batch sampler that keeps this rank's share of every batch of indices and notes the batch's whole size."""

    def __init__(self, sampler: Any, ranks: RankBatches, sizes: deque[int]) -> None:
        self.sampler, self.ranks, self.sizes = sampler, ranks, sizes

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.sampler:
            own = indices[rank_rows(self.ranks._enough(len(indices)), self.ranks.rank, self.ranks.world)]
            if own:  # nothing can be collated of nothing
                self.sizes.append(len(indices))
                yield own


def _sliced_dataloader(loader: Any, ranks: RankBatches, sizes: deque[int]) -> Any:
    return torch.utils.data.DataLoader(
        loader.dataset,
        # For mypy: a sampler of batches, which is what DataLoader makes of it.
        batch_sampler=_SlicedSampler(loader.batch_sampler, ranks, sizes),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def reseeded(batches: RankBatches, seed: int, epoch: int, device: torch.device) -> Iterator[tuple[Any, float]]:
    """``batches``; after the first one the rank's own random numbers begin, so that ranks drop out different units.

    Until then all ranks share theirs, because a DataLoader without a generator draws its order from them.
    """
    for index, item in enumerate(batches):
        if index == 0 and batches.rank > 0:
            reseed(seed, epoch, device, batches.rank)
        yield item


def evaluate_shards(accelerator: Accelerator, model: nn.Module, loader: Loader) -> float:
    """Top-1 accuracy in [0, 1], each rank running its share of every batch; all ranks return the same number."""
    world = accelerator.num_processes
    shards = (batch for batch, _ in RankBatches(loader, accelerator.process_index, world)) if world > 1 else loader
    correct, total = count_correct(model, shards)
    counts = torch.stack([correct, torch.tensor(total, device=correct.device)])
    if world > 1:
        torch.distributed.all_reduce(counts)
    if int(counts[1]) == 0:
        raise ValueError("evaluate: expected at least one sample, got an empty loader")
    return int(counts[0]) / int(counts[1])


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The mean of ``values`` over the ranks, on every rank."""
    return accelerator.reduce(values, "mean") if accelerator.num_processes > 1 else values
