"""Checkpoint files taken apart and put together again with hashes that hold: what only an attacker writes.

Everything here is written from the format's description alone, without the code that reads it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conversion_models import BACKEND, block_sparse_, randomize_batch_norm_
from torch import Tensor, nn

from slimkernels import Policy, convert, save
from slimkernels.formats import BlockMask, block_mask
from slimkernels.nn import LowRankConv2d, LowRankLinear


@dataclass
class Crafted:
    """A file's parts: metadata, plan, tensors as ``[dtype, shape, bytes]``; what ``header`` holds replaces entries.

    Of a compact file ``index`` is the object in its tensor ``index``, without the plan, which is ``plan`` here too.
    """

    meta: dict[str, Any]
    plan: dict[str, Any]
    tensors: dict[str, list[Any]]
    header: dict[str, Any] = field(default_factory=dict)
    plan_text: str | None = None
    index: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Crafted:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        meta, body = header.pop("__metadata__"), data[8 + length :]
        tensors = {
            name: [e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]]]
            for name, e in header.items()
        }
        if meta["format_version"] == "2":
            index = json.loads(zlib.decompress(tensors["index"][2]))
            return cls(meta, index.pop("plan"), tensors, index=index)
        return cls(meta, json.loads(meta["plan"]), tensors)

    def entry(self, name: str) -> dict[str, Any]:
        """The entry of a tensor in the index of a compact file."""
        assert self.index is not None
        return next(entry for entry in self.index["tensors"] if entry["name"] == name)

    def copy(self) -> Crafted:
        return copy.deepcopy(self)

    def layer(self, name: str) -> dict[str, Any]:
        """The plan of a layer."""
        return next(layer for layer in self.plan["layers"] if layer["name"] == name)

    def to_bytes(self) -> bytes:
        """The file, every hash right."""
        meta, tensors = dict(self.meta), dict(self.tensors)
        plan = json.dumps(self.plan) if self.plan_text is None else self.plan_text
        if self.index is None:
            meta["plan"] = plan
        elif "index" in tensors:
            text = json.dumps(self.index)[:-1] + f', "plan": {plan}}}'
            raw = zlib.compress(text.encode("utf-8", "surrogatepass"))
            tensors["index"] = ["U8", [len(raw)], raw]
        texts = [n for n in ("plan", "extra_state") if isinstance(meta.get(n), str)]
        hashes = {n: hashlib.sha256(meta[n].encode("utf-8", "replace")).hexdigest() for n in texts}
        header: dict[str, Any] = {"__metadata__": meta}
        body, position = [], 0
        for name, (dtype, shape, raw) in tensors.items():
            digest = hashlib.sha256(f"{dtype}{tuple(shape)}".encode())
            digest.update(raw)
            hashes[f"tensor:{name}"] = digest.hexdigest()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
            body.append(raw)
            position += len(raw)
        meta.setdefault("sha256", "")
        meta["sha256"] = json.dumps(hashes)
        for name, value in self.header.items():
            header[name] = value
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + b"".join(body)


class Residual(nn.Module):
    """Every kind of entry that a plan has: sparse, low-rank and merged layers, what is folded, fused and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.relu1, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.low_rank = nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.vertical = nn.Conv2d(24, 4, (3, 1), padding=(1, 0), bias=False)
        self.horizontal = nn.Conv2d(4, 24, (1, 3), padding=(0, 1))
        self.norm = nn.GroupNorm(4, 24)
        self.hidden, self.out = nn.Linear(24 * 16, 20), nn.Linear(20, 6)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.grouped(x + self.conv2(x))
        x = self.norm(self.horizontal(self.vertical(self.low_rank(x))))
        return self.out(torch.relu(self.hidden(x.flatten(1))))


class Small(nn.Module):
    """Tucker-2, a low-rank linear layer, tied and masked weights, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=2, dilation=2)
        self.second = nn.Conv2d(16, 16, 3)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.linear, self.last = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.first(x))).mean((2, 3))
        return self.last(self.linear(self.b(self.a(x))))


def residual(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    model = Residual()
    for name, block in (("conv1", (16, 1)), ("conv2", (16, 1)), ("hidden", (4, 4))):
        block_sparse_(model.get_submodule(name), block, seed=seed)
    randomize_batch_norm_(model, seed)
    return model.eval()


def small(seed: int = 0, masked: bool = False) -> Small:
    torch.manual_seed(seed)
    model = Small()
    block_sparse_(model.second, (16, 1), seed=seed)
    if masked:
        mask = block_mask(model.second.weight, (16, 1))
        nn.utils.parametrize.register_parametrization(
            model.second, "weight", BlockMask(mask, model.second.weight.shape, (16, 1))
        )
    return model.eval()


def _policy(**changes: Any) -> Policy:
    shapes = ((16, 1), (8, 4), (4, 4))
    return Policy(min_speedup=0, measure=False, backend=BACKEND, block_shapes=shapes, **changes)


def bases(folder: Path) -> list[tuple[str, Crafted, nn.Module, Tensor]]:
    """``(name, file, a fresh model of its architecture, an input)`` of files that `load` takes."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = residual()
    model.low_rank = LowRankConv2d(32, 24, 3, 2, 1, kind="svd", ranks=[6]).eval()
    other = small()
    other.first = LowRankConv2d(3, 16, 3, 1, 2, 2, kind="tucker2", ranks=[2, 5]).eval()
    other.linear = LowRankLinear(16, 12, 3).eval()
    made = {
        "low_rank": (convert(model, policy=_policy(merge_low_rank=False)), residual(1)),
        "merged": (convert(residual(), policy=_policy(exclude=("conv2",))), residual(1)),
        "tucker2": (convert(other, policy=_policy(merge_low_rank=False)), small(1)),
        "training": (convert(small(masked=True), policy=_policy(exclude=("second",)), training=True), small(1)),
    }
    found = []
    for name, (fast, into) in made.items():
        path = folder / f"{name}.slim.safetensors"
        for values in ("fp32", *COMPACT.get(name, ())):
            save(fast, path, values=values)
            found.append((name if values == "fp32" else f"{name} {values}", Crafted.read(path), into, x))
    return found


# Which files exist as compact ones, too; together they have every way to store a tensor.
COMPACT = {"low_rank": ("int8",), "merged": ("int4",), "tucker2": ("bf16", "int4"), "training": ("int8",)}
