"""Fuzz of `slimkernels.load`: crafted files whose hashes hold, and damaged ones.

``PYTHONPATH=tests/helpers python tests/fuzz/fuzz_checkpoint.py --seconds 60`` or ``--cases 1000``; ``--seed`` and
``--only CASE`` repeat a finding.
For every file `load` and `explain` raise a ValueError or TypeError, without asking for much more memory than the file
has; or the loaded model computes what its weights say, densified and run by torch in float64. The exit status is 1 at
the first file for which neither holds. Run it with an extension built under AddressSanitizer to see stray reads too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crafted_files import Crafted, bases
from torch import Tensor, nn

from slimkernels import explain, load
from slimkernels.conversion.placement import DROP_IN_LAYERS

# Beyond what the process has when it begins; a file has at most a few hundred KiB.
_MEMORY = 256 * 2**20
NUMBERS: list[Any] = [
    0, 1, 2, 3, 5, 8, 16, 32, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**63 - 1, 2**63, 10**30, 10**400, 1.5, 1e308
]  # fmt: skip
ODD: list[Any] = [None, True, False, "", "x", "\ud800", [], {}, [[]], {"a": 1}, float("nan"), float("inf")]
WORDS = [
    "swap", "keep", "fold", "fuse", "bsr", "low_rank", "dense", "svd", "tai", "tucker2", "float64", "float32",
    "float16", "bfloat16", "int8", "none", "relu", "relu_maxpool2", "Conv2d", "Linear", "BatchNorm2d", "ReLU",
    "MaxPool2d", "Sequential", "Identity", "LowRankConv2d", "BlockSparseLinear", "measured", "bsr_conv2d__reference",
    "bsr_conv2d_f32__scalar", "bsr_linear_f32__avx2",
]  # fmt: skip
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
Mutation = Callable[[random.Random, Crafted], str]


def deep(depth: int = 5000) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def any_value(rng: random.Random) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return copy.deepcopy(rng.choice(ODD))
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2:
        return rng.choice(NUMBERS)
    return [rng.choice(NUMBERS[:14] if kind < 6 else NUMBERS) for _ in range(rng.choice([1, 2, 2, 2, 3, 4, 4]))]


def plan_field(rng: random.Random, file: Crafted) -> str:
    layer = rng.choice(file.plan["layers"])
    name = rng.choice(list(layer))
    layer[name] = any_value(rng)
    return f"layer {layer['name']!r}: {name} = {layer[name]!r}"


def plan_number(rng: random.Random, file: Crafted) -> str:
    """One number of the plan, near to what it was or far from it."""
    places = [(layer, name) for layer in file.plan["layers"] for name, v in layer.items() if _numbers(v)]
    layer, name = rng.choice(places)
    numbers, i = layer[name], rng.randrange(len(layer[name]))
    numbers[i] = rng.choice([numbers[i] + 1, numbers[i] - 1, 2 * numbers[i], rng.choice(NUMBERS)])
    return f"layer {layer['name']!r}: {name} = {numbers!r}"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(v) is int for v in value)


def plan_name(rng: random.Random, file: Crafted) -> str:
    layer, other = rng.choice(file.plan["layers"]), rng.choice(file.plan["layers"])
    field = rng.choice(["name", "into", "type"])
    layer[field] = rng.choice(
        ["", "nowhere", "stem.weight", "second.parametrizations.weight", other["name"], other["type"]]
    )
    return f"{field} of a layer = {layer[field]!r}"


def plan_layers(rng: random.Random, file: Crafted) -> str:
    layers = file.plan["layers"]
    what = rng.choice(["drop", "twice", "mix", "shuffle"])
    if what == "drop":
        del layers[rng.randrange(len(layers))]
    elif what == "twice":
        layers.append(copy.deepcopy(rng.choice(layers)))
    elif what == "shuffle":
        rng.shuffle(layers)
    else:
        a, b = rng.choice(layers), rng.choice(layers)
        for name in rng.sample(list(a), rng.randrange(1, 6)):
            a[name] = copy.deepcopy(b[name])
    return f"layers of the plan: {what}"


def plan_whole(rng: random.Random, file: Crafted) -> str:
    name = rng.choice([*file.plan, "surplus"])
    file.plan[name] = rng.choice([any_value(rng), not file.plan.get("training")])
    return f"plan: {name} = {file.plan[name]!r}"


def plan_text(rng: random.Random, file: Crafted) -> str:
    """What a JSON library would not write: a name twice, numbers that are none, a nest, characters at random."""
    text = json.dumps(file.plan)
    what = rng.choice(["twice", "nan", "deep", "noise", "field"])
    if what == "twice":
        name = rng.choice(["layers", "training", "threads"])
        text = text[:-1] + f', "{name}": {json.dumps(file.plan[name])}}}'
    elif what == "nan":
        text = re.sub(r'"sparsity": [^,]*', f'"sparsity": {rng.choice(["NaN", "1e999", "-Infinity"])}', text, count=1)
    elif what == "deep":
        nest = rng.choice([300, 900, 5000, 100_000])
        text = re.sub(r'"(stride|notes)": [^\]]*\]', rf'"\1": {"[" * nest + "]" * nest}', text, count=1)
    elif what == "field":
        name = rng.choice(["weight_shape", "reason", "dtype"])
        text = re.sub(rf'"{name}": (\[[^\]]*\]|[^,]*), ', "", text, count=1)
    else:
        i = rng.randrange(len(text))
        text = text[:i] + rng.choice('{}[]",:0-\\') + text[i + rng.randrange(2) :]
    file.plan_text = text
    return f"text of the plan: {what}"


def _pick(rng: random.Random, file: Crafted) -> str:
    return rng.choice(list(file.tensors))


def tensor_dtype(rng: random.Random, file: Crafted) -> str:
    """Another dtype over the same bytes, or over as many zeros as it takes."""
    name = _pick(rng, file)
    before, shape, raw = file.tensors[name]
    after = rng.choice(list(DTYPES))
    if rng.random() < 0.5 and len(shape) and shape[-1] * DTYPES[before] % DTYPES[after] == 0:
        shape = [*shape[:-1], shape[-1] * DTYPES[before] // DTYPES[after]]
    else:
        raw = bytes(len(raw) // DTYPES[before] * DTYPES[after])
    file.tensors[name] = [after, shape, raw]
    return f"{name}: {before} -> {after} {shape}"


def tensor_shape(rng: random.Random, file: Crafted) -> str:
    name = _pick(rng, file)
    dtype, shape, raw = file.tensors[name]
    what = rng.choice(["transpose", "flat", "ones", "longer", "shorter", "empty"])
    if what == "transpose":
        shape = shape[::-1]
    elif what == "flat":
        shape = [len(raw) // DTYPES[dtype]]
    elif what == "ones":
        shape = [*shape, *[1] * rng.choice([1, 2, 70])]
    elif what == "empty":
        shape, raw = [*rng.choice([[0], [0, 2**31], [0, 2**62], [2**63, 0, 2]]), *shape], b""
    elif shape:
        i = rng.randrange(len(shape))
        shape = [*shape]
        shape[i] = max(0, shape[i] + (1 if what == "longer" else -1))
        size = DTYPES[dtype]
        for n in shape:
            size *= n
        raw = (raw * 2 + bytes(size))[:size]
    file.tensors[name] = [dtype, shape, raw]
    return f"{name}: {what} {shape}"


def tensor_value(rng: random.Random, file: Crafted) -> str:
    name = _pick(rng, file)
    dtype, shape, raw = file.tensors[name]
    size = DTYPES[dtype]
    if not raw:
        return "nothing"
    i = rng.randrange(len(raw) // size) * size
    if dtype in ("I32", "I64"):
        number = rng.choice([-1, 0, 1, 7, 144, 10**6, 2**31 - 1, -(2**31)])
        piece = number.to_bytes(size, "little", signed=True)
    else:
        piece = rng.choice([bytes(size), b"\xff" * size, b"\x02" * size, rng.randbytes(size)])
    file.tensors[name] = [dtype, shape, raw[:i] + piece + raw[i + size :]]
    return f"{name}: element {i // size} = {piece!r}"


def tensor_indices(rng: random.Random, file: Crafted) -> str:
    """The indices of a sparse layer, changed as a whole."""
    name = rng.choice([n for n in file.tensors if n.endswith("_indices")] or list(file.tensors))
    dtype, shape, raw = file.tensors[name]
    what = rng.choice(["random", "sorted", "reversed", "zero"])
    numbers = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw) // 4 * 4, 4)]
    if what == "random":
        numbers = [rng.choice([rng.randrange(64), rng.randrange(-(2**31), 2**31)]) for _ in numbers]
    elif what == "sorted":
        numbers = sorted(rng.randrange(max(1, 2 * len(numbers))) for _ in numbers)
    elif what == "reversed":
        numbers.reverse()
    else:
        numbers = [0] * len(numbers)
    file.tensors[name] = [
        dtype,
        shape,
        b"".join(n.to_bytes(4, "little", signed=True) for n in numbers) + raw[len(raw) // 4 * 4 :],
    ]
    return f"{name}: {what}"


def tensor_names(rng: random.Random, file: Crafted) -> str:
    a, b = _pick(rng, file), _pick(rng, file)
    what = rng.choice(["drop", "swap", "rename", "surplus"])
    if what == "drop":
        del file.tensors[a]
    elif what == "swap":
        file.tensors[a], file.tensors[b] = file.tensors[b], file.tensors[a]
    elif what == "rename":
        file.tensors[a + rng.choice(["x", "", ".0"])] = file.tensors.pop(a)
    else:
        file.tensors[rng.choice(["surplus", a + "2", "stem.bn", "_extra_state"])] = file.tensors[b]
    return f"tensors {a}, {b}: {what}"


def consistent_dtype(rng: random.Random, file: Crafted) -> str:
    """A layer in another dtype, its plan and tensors alike: legal for floating point."""
    layer = rng.choice(file.plan["layers"])
    code, word = rng.choice([("F64", "float64"), ("F16", "float16"), ("BF16", "bfloat16"), ("I32", "int32")])
    layer["dtype"] = word
    for name, (dtype, shape, raw) in file.tensors.items():
        if name.startswith(layer["name"] + ".") and dtype == "F32":
            file.tensors[name] = [code, shape, bytes(len(raw) // 4 * DTYPES[code])]
    return f"layer {layer['name']!r} in {word}"


def consistent_block(rng: random.Random, file: Crafted) -> str:
    """Another block shape with room for its values; without any block, of any size."""
    layers = [layer for layer in file.plan["layers"] if layer["format"] == "bsr"]
    if not layers:
        return "nothing"
    layer = rng.choice(layers)
    block = rng.choice([[1, 1], [16, 2], [64, 64], [2**16, 1], [2**17, 1], [2**16, 2**16], [1, 2**31 - 1]])
    rows = -(-layer["weight_shape"][0] // block[0])
    layer["block_shape"] = block
    name = layer["name"]
    file.tensors[f"{name}.values"] = ["F32", [0, *block], b""]
    file.tensors[f"{name}.col_indices"] = ["I32", [0], b""]
    file.tensors[f"{name}.crow_indices"] = ["I32", [rows + 1], bytes(4 * rows + 4)]
    return f"layer {name!r}: no blocks of {block}"


def extra_state(rng: random.Random, file: Crafted) -> str:
    state: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # another mutation was there first
        state = dict(json.loads(file.meta["extra_state"]))
    key = rng.choice([*state, "_extra_state", "out.weight", "nothing._extra_state"])
    state[key] = any_value(rng) if rng.random() < 0.8 else {"block_shape": any_value(rng), "weight_shape": [1]}
    file.meta["extra_state"] = (
        json.dumps(state) if rng.random() < 0.8 else rng.choice(["", "[]", "[" * 9999, "{}", "3"])
    )
    return f"extra state {key!r}"


def _entries(file: Crafted) -> list[dict[str, Any]]:
    """How a compact file stores its tensors; IndexError where the file is not compact."""
    if file.index is None:
        raise IndexError
    return file.index["tensors"]


def index_table(rng: random.Random, file: Crafted) -> str:
    """A count, the lowest symbol, or a table as a whole: of another run, with all counts in one symbol, or wild."""
    entry = rng.choice([e for e in _entries(file) if e.get("tables")])
    tables, i = entry["tables"], rng.randrange(len(entry["tables"]))
    what = rng.choice(["count", "move", "lowest", "one symbol", "other", "wild", "number"])
    if what == "count":
        tables[i][rng.randrange(1, len(tables[i]))] += rng.choice([1, -1, 2**20, 2**62])
    elif what == "move":  # the same length, other probabilities
        a, b = rng.randrange(1, len(tables[i])), rng.randrange(1, len(tables[i]))
        moved = rng.randrange(tables[i][a] + 1)
        tables[i][a], tables[i][b] = tables[i][a] - moved, tables[i][b] + moved
    elif what == "lowest":
        tables[i][0] += rng.choice([1, -1, 8, 2**31])
    elif what == "one symbol":
        tables[i] = [rng.choice([0, 1, tables[i][0]]), sum(tables[i][1:])]
    elif what == "other":
        tables[i] = copy.deepcopy(rng.choice(rng.choice(_entries(file)).get("tables") or [[0]]))
    elif what == "number":
        tables[i][rng.randrange(len(tables[i]))] = any_value(rng)
    else:
        tables[i] = any_value(rng)
    return f"table {i} of {entry['name']!r}: {what}"


def index_shape(rng: random.Random, file: Crafted) -> str:
    """Another shape, often with tables that belong to it: what a file of nothing but zeros could claim."""
    entry = rng.choice(_entries(file))
    shape = entry["shape"]
    if shape and rng.random() < 0.8:
        shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
    else:
        shape = entry["shape"] = any_value(rng)
    if entry.get("tables") and rng.random() < 0.7:
        size = 1
        for n in shape:
            size *= n
        long = {"integers": [shape[0], size], "bfloat16": [size, 0]}.get(entry["how"], [size])
        entry["tables"] = [[0, n] if n else [0] for n in long]
    return f"shape of {entry['name']!r}: {shape!r}"


def index_entry(rng: random.Random, file: Crafted) -> str:
    entries = _entries(file)
    what, entry = (
        rng.choice(["drop", "twice", "shuffle", "swap", "field", "how", "values", "same"]),
        rng.choice(entries),
    )
    if what == "drop":
        entries.remove(entry)
    elif what == "twice":
        entries.append(copy.deepcopy(entry))
    elif what == "shuffle":
        rng.shuffle(entries)
    elif what == "swap":
        other = rng.choice(entries)
        entry["name"], other["name"] = other["name"], entry["name"]
    elif what == "field":
        entry[rng.choice([*entry, "surplus"])] = any_value(rng)
    elif what == "how":
        entry["how"] = rng.choice(["plain", "same", "mask", "pattern", "integers", "bfloat16"])
    elif what == "same":
        keep = {key: entry[key] for key in ("name", "dtype", "shape")}
        entry.clear()
        entry.update(keep, how="same", same=rng.choice(entries).get("name", entry["name"]))
    else:
        file.index["values"] = rng.choice(["bf16", "int8", "int4", "fp32", 3])  # type: ignore[index]
    return f"index: {what}"


def index_bytes(rng: random.Random, file: Crafted) -> str:
    """Coded or plain bytes changed, with a hash that holds."""
    _entries(file)
    name = rng.choice(["plain", "symbols"])
    raw = bytearray(file.tensors[name][2])
    what = rng.choice(["flip", "cut", "longer", "noise"])
    if what == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del raw[rng.randrange(len(raw)) // 4 * 4 :]
    elif what == "longer":
        raw += rng.randbytes(rng.choice([1, 2, 4, 64]))
    else:
        raw = bytearray(rng.randbytes(len(raw)))
    file.tensors[name] = ["U8", [len(raw)], bytes(raw)]
    return f"{name}: {what}"


def metadata(rng: random.Random, file: Crafted) -> str:
    name = rng.choice(["format", "format_version", "extra_state", "note"])
    file.meta[name] = rng.choice(["", "2", "{}", "\ud800"])
    return f"metadata {name}"


def header(rng: random.Random, file: Crafted) -> str:
    name = _pick(rng, file)
    dtype, shape, raw = file.tensors[name]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(raw)]}
    entry[rng.choice(["dtype", "shape", "data_offsets", "surplus"])] = rng.choice([any_value(rng), deep(900), "F8"])
    file.header = {name: rng.choice([entry, any_value(rng)])}
    return f"header entry {name!r}"


MUTATIONS: list[Mutation] = [
    plan_field, plan_field, plan_number, plan_number, plan_name, plan_layers, plan_whole, plan_text, tensor_dtype,
    tensor_shape, tensor_value, tensor_value, tensor_indices, tensor_names, consistent_dtype, consistent_block,
    extra_state, metadata, header, index_table, index_table, index_shape, index_entry, index_bytes,
]  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed without a hash to cover it."""
    what = rng.randrange(4)
    i = rng.randrange(len(data))
    if what == 0:
        return data[:i]
    if what == 1:
        return data[:i] + rng.randbytes(rng.randrange(1, 9)) + data[i:]
    broken = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        broken[rng.randrange(min(len(data), 4096) if what == 2 else len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


# What must hold


class _Dense(nn.Module):
    """A drop-in layer as torch computes it: the dense layer, then its epilogue."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.dense, self.epilogue = layer.to_dense(), layer.epilogue  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        y = y if self.epilogue == "none" else torch.relu(y)
        return nn.functional.max_pool2d(y, 2) if self.epilogue == "relu_maxpool2" else y


def densified(model: nn.Module) -> nn.Module:
    """The model with every drop-in layer as torch's own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DROP_IN_LAYERS):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Dense(module))
    return model


def disagreement(model: nn.Module, x: Tensor) -> str | None:
    """Why the model does not compute what its weights say; None where it does, or where torch itself cannot run it."""
    model = nn.Module.train(model, False)
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    with torch.no_grad():
        if len(dtypes) > 1 or dtypes == {torch.float16}:
            model = model.float()  # layers of several dtypes run in none of torch's ways either
        like = next(p for p in model.parameters())
        got = model(x.to(like.dtype))
        plain = densified(copy.deepcopy(model))
        single = plain(x.to(like.dtype)).double()
        exact = plain.double()(x.double())
    if got.shape != exact.shape:
        return f"output of shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    largest = float(exact.abs().max())
    if not largest < 1e15 or not bool(torch.isfinite(single).all()):
        return None  # products of wild weights: nothing to compare, and nothing was read out of bounds
    error, usual = float((got.double() - exact).abs().max()), float((single - exact).abs().max())
    allowed = 16 * usual + 2.0**-16 * largest + 1e-30
    return None if error <= allowed else f"outputs differ by {error:.3g}, allowed {allowed:.3g}"


def check(path: Path, into: nn.Module, x: Tensor) -> tuple[bool, str | None]:
    """Whether `load` took the file, and what is wrong with that."""
    before = {name: t.clone() for name, t in into.state_dict().items() if isinstance(t, Tensor)}
    with contextlib.suppress(ValueError):
        str(explain(path))
    try:
        model = load(path, into=into)
    except (ValueError, TypeError) as error:
        message = str(error)
        if not message.startswith("load: ") or str(path) not in message:
            return False, f"the message does not name the file: {message[:300]}"
        if len(message) > 4000:
            return False, f"a message of {len(message)} characters"
        same = all(torch.equal(t, before[n]) for n, t in into.state_dict().items() if n in before)
        return False, None if same else "into was changed"
    return True, disagreement(model, x)


def under_sanitizer() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "libasan" in maps.read_text()


def limit_memory() -> None:
    """Refuses the process more address space than it has and a bit: a wild size then fails at once."""
    try:
        import resource
    except ImportError:
        return
    statm = Path("/proc/self/statm")
    if under_sanitizer() or not statm.exists():  # its shadow memory alone takes terabytes of addresses
        return
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def crafted(seed: int, case: int, files: list[tuple[str, Crafted, nn.Module, Tensor]]) -> tuple[int, bytes, str]:
    """``(base, bytes, what was done)`` of a case."""
    rng = random.Random(f"{seed}/{case}")
    base = rng.randrange(len(files))
    file, told = files[base][1].copy(), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            told.append(rng.choice(MUTATIONS)(rng, file))
        except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
            break  # the mutation before left nothing that this one could change
    data = file.to_bytes()
    if rng.random() < 0.1:
        told.append("damaged")
        data = damaged(rng, data)
    return base, data, "; ".join(told)


def run(cases: int | None, seconds: float | None, seed: int, only: int | None) -> int:
    """The number of findings (at most 1); prints what was done."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    taken = case = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = bases(folder)
        for base, file, into, x in files:
            (folder / "whole").write_bytes(file.to_bytes())
            took, problem = check(folder / "whole", into, x)
            if not took or problem is not None:
                print(f"base {base!r} is not loaded as it is: {problem}")
                return 1
        limit_memory()
        path = folder / "crafted.slim.safetensors"
        for case in [only] if only is not None else range(cases if cases is not None else sys.maxsize):
            if time.monotonic() > end:
                break
            base, data, told = crafted(seed, case, files)
            path.write_bytes(data)
            try:
                took, problem = check(path, *files[base][2:])
            except Exception as error:
                took, problem = False, f"{type(error).__name__}: {str(error)[:500]}"
                if only is not None:
                    raise
            taken += took
            if only is not None or problem is not None:
                print(f"seed {seed}, case {case}, base {files[base][0]!r}: {told}"[:2000])
            if problem is not None:
                print(f"FOUND: {problem}\nrepeat it with --seed {seed} --only {case}")
                return 1
    print(f"fuzz_checkpoint: {case + 1} files, {taken} of them loaded, nothing found (seed {seed})")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="number of files (default: 1000 without --seconds)")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone and let its exception through")
    arguments = parser.parse_args()
    cases = 1000 if arguments.cases is None and arguments.seconds is None else arguments.cases
    return run(cases, arguments.seconds, arguments.seed, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
