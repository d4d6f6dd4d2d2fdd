"""Compact files: what they decode to, how near they are to their bound, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_models import FORCE, Tiny, block_sparse_, force, images, sparse_tiny
from crafted_files import Crafted, bases
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor, nn

from slimkernels import checkpoint, convert, explain, load, models, quantize_, save
from slimkernels.conversion import quantization
from slimkernels.conversion.symbols import Decoder, Encoder, Table, choices
from slimkernels.formats import BSRWeight, block_grid

COMPACT = ("bf16", "int8", "int4")


def same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]) and value.dtype == other[name].dtype, name


# Round trips


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Crafted, nn.Module, Tensor]]:
    return {name: (file, into, x) for name, file, into, x in bases(tmp_path_factory.mktemp("bases"))}


@pytest.fixture(scope="module")
def made(files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """Converted models with every kind of layer, a fresh one of each architecture, and an input."""
    path, found = tmp_path_factory.mktemp("made") / "x", {}
    for name, (file, into, x) in files.items():
        if " " not in name:
            path.write_bytes(file.to_bytes())
            found[name] = load(path, into), into, x
    found["tiny"] = convert(sparse_tiny(), policy=FORCE), Tiny(), images()
    return found


@pytest.mark.parametrize("values", COMPACT)
@pytest.mark.parametrize("name", ["low_rank", "merged", "tucker2", "training", "tiny"])
def test_a_loaded_model_is_the_one_rounded_in_memory(name: str, values: str, made: Any, tmp_path: Path) -> None:
    model, into, x = made[name]
    save(model, tmp_path / "x", values=values)
    rounded = copy.deepcopy(model)
    assert quantize_(rounded, values) is rounded
    loaded = load(tmp_path / "x", into)
    assert explain(loaded).plan == explain(model).plan == explain(tmp_path / "x").plan
    same(loaded, rounded, x)
    # What is rounded stays as it is, in memory and in a file.
    again = quantize_(copy.deepcopy(rounded), values)
    same(again, rounded, x)
    save(rounded, tmp_path / "y", values=values)
    same(load(tmp_path / "y", into), rounded, x)


def test_a_file_of_fp32_is_what_it_was(made: Any, tmp_path: Path) -> None:
    model, _, x = made["tiny"]
    save(model, tmp_path / "x", values="fp32")
    save(model, tmp_path / "y")
    x_file = Crafted.read(tmp_path / "x")
    assert x_file == Crafted.read(tmp_path / "y") and x_file.meta["format_version"] == "1"
    assert explain(tmp_path / "x").file_bound is None
    same(quantize_(copy.deepcopy(model), "fp32"), model, x)


@pytest.mark.parametrize("values", COMPACT)
def test_the_same_model_gives_the_same_bytes(values: str, made: Any, tmp_path: Path) -> None:
    threads, digests = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            save(made["low_rank"][0], tmp_path / "x", values=values)
            digests.add(hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("values", COMPACT)
def test_models_of_other_dtypes(values: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fast = convert(sparse_tiny().to(dtype), policy=force(backend="reference"))
    save(fast, tmp_path / "x", values=values)
    loaded = load(tmp_path / "x", Tiny())
    same(loaded, quantize_(fast, values), images().to(dtype))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_load_in_another_dtype(values: str, made: Any, tmp_path: Path) -> None:
    model, into, _ = made["tiny"]
    save(model, tmp_path / "x", values=values)
    loaded, plain = load(tmp_path / "x", into, dtype=torch.bfloat16), load(tmp_path / "x", into)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, value in plain.state_dict().items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected)
    save(loaded, tmp_path / "y")  # the plan knows of it
    with pytest.raises(TypeError, match=r"^load: expected dtype to be one of torch\.float64, .*, got torch\.int8"):
        load(tmp_path / "x", into, dtype=torch.int8)


def test_odd_weights_come_back(tmp_path: Path) -> None:
    """Channels of zeros, of huge and of tiny numbers, one weight alone, no weight at all, one that is shared."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(1, 1), nn.Linear(5, 6)
            self.c.weight = self.a.weight
            self.nothing = nn.Parameter(torch.zeros(3, 0))
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("statistics", torch.tensor([[1e6, float("inf")], [float("nan"), 0.1]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.c(x) + self.b(x[:, :1])

    model = Odd()
    with torch.no_grad():
        model.a.weight *= torch.tensor([0, 1e30, 1e-30, 1, 1e-44, 1e37])[:, None]
    fast = convert(model, policy=force(exclude=("*",)))
    for values in COMPACT:
        save(fast, tmp_path / "x", values=values)
        loaded, rounded = load(tmp_path / "x", Odd()), quantize_(copy.deepcopy(fast), values)
        assert loaded.c.weight is loaded.a.weight and torch.equal(loaded.flags, model.flags)
        assert torch.equal(loaded.a.weight, rounded.a.weight) and torch.equal(loaded.b.weight, rounded.b.weight)
        assert bool((loaded.a.weight[0] == 0).all()) and torch.isfinite(loaded.a.weight).all()
        exact, got = (m.a.weight.detach()[[1, 2, 3, 5]].double() for m in (model, loaded))
        relative = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(relative.max()) < (0.2 if values == "int4" else 0.02)
        assert torch.equal(loaded.statistics.isfinite(), model.statistics.isfinite())
        assert float(loaded.statistics[0, 0] / 1e6 - 1) < 2**-8
    with torch.no_grad():
        fast.a.weight[2, 2] = float("nan")
    for values in ("int8", "int4"):
        with pytest.raises(
            ValueError, match=rf"^save: expected finite weights for values='{values}', .* in 'a\.weight'"
        ):
            save(fast, tmp_path / "x", values=values)
        with pytest.raises(ValueError, match=r"^quantize_: expected finite weights"):
            quantize_(fast, values)
    save(fast, tmp_path / "x", values="bf16")
    assert bool(load(tmp_path / "x", Odd()).a.weight[2, 2].isnan())


def test_spare_blocks_are_kept(tmp_path: Path) -> None:
    """A layer that `update_pattern` may grow again has more room than blocks."""
    model = nn.Sequential(nn.Linear(32, 32))
    block_sparse_(model[0], (8, 1))
    fast = convert(model, policy=force(block_shapes=((8, 1),)))
    layer = fast[0]
    blocks = layer.values.shape[0]
    with torch.no_grad():
        layer.crow_indices[-1] -= 1
        layer.values[-1] = 0
    layer.pattern_changed()
    for values in COMPACT:
        save(fast, tmp_path / "x", values=values)
        loaded = load(tmp_path / "x", nn.Sequential(nn.Linear(32, 32)))
        assert loaded[0].values.shape[0] == blocks and loaded[0].weight_bsr().nnz_blocks == blocks - 1
        assert torch.equal(loaded(torch.ones(1, 32)), quantize_(copy.deepcopy(fast), values)(torch.ones(1, 32)))


def test_arguments_are_checked(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save: expected values in fp32, bf16, int8, int4, got 'int2'"):
        save(made["tiny"][0], tmp_path / "x", values="int2")
    with pytest.raises(ValueError, match=r"^quantize_: expected values in fp32, bf16, int8, int4, got 8"):
        quantize_(made["tiny"][0], 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^quantize_: expected a model from slimkernels\.convert, got a plain Tiny"):
        quantize_(Tiny(), "int8")
    wide = nn.Sequential(nn.Linear(2, 2))
    block = 2**18
    fast = convert(wide, policy=force(block_shapes=((1, block),)))
    if fast[0].__class__ is not nn.Linear:
        with pytest.raises(ValueError, match=r"^save: expected tensor '0\.values' of at most"):
            save(fast, tmp_path / "x", values="int8")


# Rounding


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]), st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.floats(0, 1),
)  # fmt: skip
def test_rounding_twice_is_rounding_once(
    values: str, seed: int, rows: int, columns: int, dtype: torch.dtype, zeros: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator)
    weights = (weights * (torch.rand(rows, columns, generator=generator) >= zeros)).to(dtype)
    groups = torch.randint(3, (rows,), generator=generator)
    once = quantization.dequantize(*quantization.quantize(weights, groups, 3, values), groups, dtype)
    exponents, codes = quantization.quantize(once, groups, 3, values)
    assert torch.equal(quantization.dequantize(exponents, codes, groups, dtype), once)
    assert int(np.abs(codes).max()) <= quantization.LEVELS[values]


@pytest.mark.parametrize(("values", "gain"), [("int8", 1.0), ("int4", 0.85)])
def test_scales_leave_the_least_error(values: str, gain: float) -> None:
    """No other scale of the grid does better, and the one that clips nothing does clearly worse with few levels."""
    weights = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    groups, levels = torch.arange(4), quantization.LEVELS[values]
    exponents, codes = quantization.quantize(weights, groups, 4, values)

    def error(k: Any) -> Tensor:
        scale = quantization.scales_of(k)[:, None]
        return (((weights / scale).round().clamp(-levels, levels) * scale) - weights).norm(dim=1)

    got = (quantization.dequantize(exponents, codes, groups, torch.float32) - weights).norm(dim=1)
    for offset in range(-12, 13):
        assert bool((error((exponents + offset).astype(np.int32)) >= got * (1 - 1e-6)).all())
    holding = np.ceil(8 * np.log2(weights.abs().amax(1).numpy() / levels)).astype(np.int32)
    assert bool((got <= error(holding) * gain).all())


def test_scales_are_eighths_of_powers_of_two() -> None:
    k = np.arange(*quantization.EXPONENTS, dtype=np.int32)
    assert np.allclose(quantization.scales_of(k).double().numpy(), 2.0 ** (k / 8), rtol=2**-23, atol=0)


# The bound


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 400), st.floats(0, 1))
def test_patterns_take_the_logarithm_of_their_number(seed: int, rows: int, columns: int, density: float) -> None:
    cells = (np.random.default_rng(seed).random(rows * columns) < density).astype(np.int32)
    table = Table.of(cells)
    encoder = Encoder()
    encoder.add(cells, table)
    coded = encoder.finish()
    decoder = Decoder(coded)
    assert np.array_equal(decoder.take(table), cells)
    decoder.finish()
    bound = choices(cells.size, int(cells.sum()))
    assert bound == pytest.approx(math.log2(math.comb(cells.size, int(cells.sum()))), rel=1e-6, abs=1e-6)
    assert len(coded) <= bound / 8 * 1.1 + 12  # whole words, and where the density is estimated from few


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-127, 127), max_size=300), max_size=4))
def test_runs_take_their_entropy(runs: list[list[int]]) -> None:
    arrays = [np.array(run, dtype=np.int32) for run in runs]
    tables, encoder = [Table.of(run) for run in arrays], Encoder()
    for run, table in zip(arrays, tables):
        encoder.add(run, table)
    coded = encoder.finish()
    decoder = Decoder(coded)
    for run, table in zip(arrays, tables):
        assert np.array_equal(decoder.take(table), run)
    decoder.finish()
    assert len(coded) <= sum(table.entropy for table in tables) / 8 * 1.001 + 8


def test_the_range_coder_makes_the_bytes_that_it_always_made() -> None:
    """Files are read by later versions of the coder, so its arithmetic may not change."""
    rng = np.random.default_rng(5)
    encoder = Encoder()
    for size, spread in ((1000, 2.0), (64, 30.0), (5000, 0.2)):
        run = np.round(rng.standard_normal(size) * spread).astype(np.int32)
        encoder.add(run, Table.of(run))
    assert hashlib.sha256(encoder.finish()).hexdigest().startswith("d53c1f0e8c8af7741fd33ebafca612c3")


@pytest.mark.parametrize(("values", "smaller"), [("bf16", 2), ("int8", 3.5), ("int4", 7)])
def test_a_file_is_near_its_bound(values: str, smaller: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 128, 3), nn.Flatten(), nn.Linear(512, 64))
    for layer, block in ((model[0], (16, 1)), (model[2], (128, 16))):
        block_sparse_(layer, block, keep=0.5)
    fast = convert(model.eval(), policy=force(block_shapes=((16, 1), (128, 16)), exclude=("4",)))
    save(fast, tmp_path / "x", values=values)
    report, nbytes = explain(tmp_path / "x"), (tmp_path / "x").stat().st_size
    bound = report.file_bound
    assert report.file_bytes == nbytes and bound is not None
    assert bound.total == bound.values + bound.patterns + bound.scales + bound.plain
    # Counted anew: what a weight is rounded to, and which blocks there are.
    patterns = 0.0
    for layer in (fast[0], fast[2]):
        w: BSRWeight = layer.weight_bsr()
        patterns += math.log2(math.comb(math.prod(block_grid(w.weight_shape, w.block_shape)), w.nnz_blocks)) / 8
    assert bound.patterns == pytest.approx(patterns, abs=3)
    assert bound.plain == 2 * (256 + 128 + 64)
    assert bound.total <= nbytes <= 1.1 * bound.total + 1500
    values_of = [fast[0].values, fast[2].values, fast[4].weight]
    assert smaller * nbytes < 4 * sum(v.numel() for v in values_of)
    assert re.search(rf"file: {nbytes} bytes, .*x smaller than dense", str(report))
    assert re.search(rf"bound: {bound.total} bytes \(values {bound.values}, .* takes [\d.]+% more", str(report))
    assert f'"file_bound": {{"values": {bound.values}' in report.to_json()
    assert explain(load(tmp_path / "x", model)).bytes_stored == report.bytes_stored == report.state_bytes


def test_the_page_shows_the_bytes_that_were_measured() -> None:
    """And every compact file of the record is within 10% of its bound."""
    record = (ROOT / "benchmarks" / "results" / "compact-files.md").read_text().splitlines()[2:]
    measured: dict[tuple[str, str], dict[str, list[str]]] = {}
    for line in record:
        zeros, shape, values, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        measured.setdefault((zeros, shape), {})[values] = cells
        if values in COMPACT:
            nbytes, bound = (int(cell.replace(",", "")) for cell in cells[:2])
            assert bound < nbytes <= 1.1 * bound
    page = re.findall(
        r"^\| ([\d.]+%) \| ([\w ]+) \| ([\d,]+ .*) \|$", (ROOT / "docs" / "compression.md").read_text(), re.M
    )
    assert {(zeros, shape) for zeros, shape, _ in page} == set(measured) and len(measured) == 9
    for zeros, shape, rest in page:
        rows = measured[zeros, shape]
        names = ("fp32", "fp32, gzip -9", "fp32, zstd -19", *COMPACT)
        expected = [rows[name][0] for name in names] + [rows["int4"][2], rows["int4"][4]]
        assert rest.split(" | ") == expected


# Without the extra


def test_what_needs_the_extra_says_so(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, into, x = made["tiny"]
    save(model, tmp_path / "compact", values="int8")
    monkeypatch.setitem(sys.modules, "constriction", None)
    message = r": expected the package constriction, got none; install it with: pip install 'slimkernels\[compact\]'"
    with pytest.raises(ImportError, match="^save" + message):
        save(model, tmp_path / "x", values="int8")
    with pytest.raises(ImportError, match="^load" + message):
        load(tmp_path / "compact", into)
    assert explain(tmp_path / "compact").file_bytes
    quantize_(copy.deepcopy(model), "int8")
    save(model, tmp_path / "x")
    same(load(tmp_path / "x", into), model, x)


# Damage


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small compact file with a sparse layer and a kept one."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    block_sparse_(model[0], (8, 1))
    path = tmp_path_factory.mktemp("tiny") / "x"
    save(convert(model, policy=force(exclude=("1",))), path, values="int8")
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    into = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=rf"^load: {re.escape(str(path))}: ") as error:
        load(path, into)
    return str(error.value).removeprefix(f"load: {path}: ")


def test_every_flipped_byte_is_refused(tiny_file: bytes, tmp_path: Path) -> None:
    start = 8 + int.from_bytes(tiny_file[:8], "little")
    for position in range(0, len(tiny_file), 3):
        broken = bytearray(tiny_file)
        broken[position] ^= 1 << (position % 8)
        text = refused(tmp_path / "x", bytes(broken))
        assert text.split(":")[0].split(" ")[0] in ("header", "metadata", "tensor", "file"), text
        if position >= start:
            assert re.match(r"tensor '(index|plain|symbols)': expected SHA-256", text)


def test_truncated_and_extended_files_are_refused(tiny_file: bytes, tmp_path: Path) -> None:
    for size in range(0, len(tiny_file), 41):
        refused(tmp_path / "x", tiny_file[:size])
    refused(tmp_path / "x", tiny_file + b"\0")


def entry(which: str, **fields: Any) -> Callable[[Crafted], Any]:
    return lambda file: file.entry(which).update(fields)


def first_table(name: str, change: Callable[[list[int]], Any]) -> Callable[[Crafted], Any]:
    return lambda file: change(file.entry(name)["tables"][0])


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Crafted], Any]:
    def put(file: Crafted) -> None:
        data = change(file.tensors[name][2])
        file.tensors[name] = ["U8", [len(data)], data]

    return put


def forget_pattern(file: Crafted) -> None:
    file.index["tensors"].remove(file.entry("conv2"))  # type: ignore[index]


def plain_indices(file: Crafted) -> None:
    """Indices that are stored as they are, which nothing has checked when blocks are decoded."""
    forget_pattern(file)
    tensors = file.index["tensors"]  # type: ignore[index]
    for part in ("crow_indices", "col_indices"):
        tensors.insert(0, {"name": f"conv2.{part}", "how": "plain", "dtype": "int32", "shape": [5], "stored": "int32"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.index.update(values="fp32"), r"tensor 'index': expected values in bf16, int8, int4, got 'fp32'"),
        (lambda f: f.index.update(values="int4"), r"tensor '.*': expected symbols in \[-7, 7\]"),
        (lambda f: f.index.update(values="bf16"), r"expected 'integers' of another dtype or shape"),
        (lambda f: f.index.update(more=1), r"tensor 'index': expected an object of values, plan"),
        (lambda f: f.index.update(extra_state={"a._extra_state": 1}), r"have tensor 'a\._extra_state' of the file"),
        (lambda f: f.index["tensors"].append(f.entry("steps")), r"expected each tensor once, got 'steps' twice"),
        (lambda f: f.index["tensors"].remove(f.entry("steps")), r"bytes of what is stored plainly, got"),
        (lambda f: f.index["tensors"].append(3), r"expected a tensor to be an object with a name, got 3"),
        (lambda f: f.tensors.pop("plain"), r"header: expected the tensors index, plain, symbols"),
        (entry("conv2.values", how="zip"), r"tensor 'conv2\.values': expected how in plain, same, mask"),
        (entry("conv2.values", how="mask"), r"expected 'mask' of another dtype or shape"),
        (entry("conv2.values", dtype="int8"), r"expected 'integers' of another dtype or shape, got int8"),
        (entry("conv2.values", dtype="float8"), r"expected dtype to name a dtype or a tensor, got 'float8'"),
        (entry("conv2.values", shape=[1, 2]), r"expected shape \(\d+, \d+, \d+\) of its pattern"),
        (entry("conv2.values", shape=[-1, 16, 1]), r"expected shape of non-negative integers"),
        (entry("grouped.weight", shape=[1] * 65), r"expected shape of at most"),
        (entry("grouped.weight", shape=[32, 8, 3, 4]), r"'grouped\.weight': expected \[32, 3072\] symbols, got"),
        (entry("grouped.weight", tables=[[0, 32]]), r"'grouped\.weight': expected 2 tables, got"),
        (entry("grouped.weight", tables=[[2000, 32], [0, 2304]]), r"expected symbols in \[-1008, 1015\], got"),
        (entry("grouped.weight", tables=[[0, 32], [0, 2304, 0]]), r"expected counts of symbols that occur"),
        (entry("grouped.weight", tables=[[0, 32], [0, 2305, -1]]), r"expected counts of symbols that occur"),
        (entry("grouped.weight", tables=[[0, 32], []]), r"expected a table of integers, got \[\]"),
        (entry("grouped.weight", tables=[[0, 32], [0, True]]), r"expected a table of integers"),
        (entry("grouped.bias", stored="int16"), r"expected 'plain' of another dtype or shape"),
        (entry("grouped.bias", surplus=1), r"tensor 'grouped\.bias': expected the fields of 'plain'"),
        (first_table("conv2", lambda t: t.__setitem__(slice(None), [0, sum(t[1:])])), r"conv2\.values.: expected"),
        (entry("conv2", name="grouped"), r"'grouped': expected a pattern of a block-sparse layer of the plan"),
        (first_table("conv2", lambda t: t.__setitem__(1, t[1] + 1)), r"'conv2': expected a pattern of \d+ blocks, got"),
        (forget_pattern, r"'conv2\.values': expected a pattern and then values of blocks"),
        (plain_indices, r"'conv2\.c.*_indices': expected a pattern and then values of blocks, got 'plain'"),
        # coded bytes that belong to something else
        (raw("symbols", lambda b: b[:-4]), r"tensor '.*': expected (symbols coded by|the symbols that) their table"),
        (raw("symbols", lambda b: b + b"\1\2\3\4" * 4), r"expected no coded symbols beyond the last table"),
        (raw("symbols", lambda b: b[:-1]), r"expected coded symbols of 4 bytes a word, got \d+ bytes"),
        (raw("symbols", lambda b: b[4:] + b[:4]), r"tensor '.*': expected (symbols coded by|the symbols that)"),
        (raw("plain", lambda b: b + b"\0"), r"bytes of what is stored plainly, got"),
        (raw("index", lambda b: b), None),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(change: Any, message: str | None, files: Any, tmp_path: Path) -> None:
    file, into, _ = files["low_rank int8"]
    change(file := file.copy())
    (tmp_path / "x").write_bytes(file.to_bytes())
    if message is None:  # the file as it is
        load(tmp_path / "x", into)
        return
    with pytest.raises(ValueError, match=rf"^load: {re.escape(str(tmp_path / 'x'))}: .*" + message) as error:
        load(tmp_path / "x", into)
    assert len(str(error.value)) < 1000


def test_tables_of_the_same_length_but_other_symbols_are_refused(files: Any, tmp_path: Path) -> None:
    """What the hashes of an attacker hold for: the right number of symbols, of another distribution."""
    file, into, _ = files["low_rank int8"]
    change = first_table("conv2", lambda t: t.__setitem__(slice(1, 3), [t[2], t[1]]))
    change(file := file.copy())
    (tmp_path / "x").write_bytes(file.to_bytes())
    with pytest.raises(ValueError, match=r"^load: .*tensor 'conv2"):
        load(tmp_path / "x", into)


def test_an_index_that_deflates_too_well_is_refused(files: Any, tmp_path: Path) -> None:
    file, into, _ = files["low_rank int8"]
    file = file.copy()
    file.plan["notes"] = ["0" * 10**7]
    (tmp_path / "x").write_bytes(file.to_bytes())
    with pytest.raises(ValueError, match=r"^load: .*tensor 'index': expected at most \d+ bytes of JSON, got more"):
        load(tmp_path / "x", into)
    model = convert(sparse_tiny(), policy=FORCE)
    plan = explain(model).plan
    model.slimkernels_plan = type(plan)(plan.layers, plan.decided, notes=("0" * 10**6,))
    save(model, tmp_path / "y", values="int8")  # and `save` never writes one
    assert explain(load(tmp_path / "y", Tiny())).plan.notes == ("0" * 10**6,)


def test_a_file_may_not_name_a_model_far_larger_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights zero: a few KiB for any number of them. A model that is passed as ``into`` bounds them by itself."""
    model = models.build("vgg_digits", 10, width=0.25).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    builder = {"model": "vgg_digits", "num_classes": 10, "options": {"width": 0.25}}
    save(convert(model, policy=force(exclude=("*",))), tmp_path / "x", values="int4", builder=builder)
    load(tmp_path / "x")
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(checkpoint, "_MOST_PER_BYTE", 4 * weights // (tmp_path / "x").stat().st_size)
    with pytest.raises(
        ValueError, match=r"^load: .*expected tensors of at most \d+ bytes where the file names its model"
    ):
        load(tmp_path / "x")
    load(tmp_path / "x", into=model)
