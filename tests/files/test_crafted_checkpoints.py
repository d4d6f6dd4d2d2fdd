"""Files whose hashes all hold but whose numbers are wrong: refused by name and field, before anything is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_checkpoint
import pytest
import torch
from conversion_models import FORCE, Tiny, force, images, sparse_tiny
from crafted_files import Crafted, Residual, Small, bases, residual, small
from places import PYTHONPATH, TESTS
from torch import Tensor, nn

from slimkernels import convert, explain, load, save
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear

Change = Callable[[Crafted], Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Crafted, nn.Module, Tensor]]:
    return {name: (file, into, x) for name, file, into, x in bases(tmp_path_factory.mktemp("bases"))}


def refusal(file: Crafted, into: nn.Module, path: Path) -> str:
    """The message with which `load` refuses a file, without the file's name, which it must give."""
    path.write_bytes(file.to_bytes())
    before = {name: value.clone() for name, value in into.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=rf"^load: {re.escape(str(path))}: ") as error:
        load(path, into=into)
    after = {name: value for name, value in into.state_dict().items() if isinstance(value, Tensor)}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return str(error.value).removeprefix(f"load: {path}: ")


@pytest.mark.parametrize("base", ["low_rank", "merged", "tucker2", "training"])
def test_the_files_that_are_changed_here_load_as_they_are(base: str, files: Any, tmp_path: Path) -> None:
    file, into, x = files[base]
    (tmp_path / "x").write_bytes(file.to_bytes())
    actions = {layer["action"] for layer in file.plan["layers"]}
    assert actions == ({"swap", "keep"} if base in ("tucker2", "training") else {"swap", "keep", "fold", "fuse"})
    assert torch.isfinite(load(tmp_path / "x", into=into)(x)).all()


def put(layer: str, **fields: Any) -> Change:
    return lambda file: file.layer(layer).update(fields)


def tensor(name: str, dtype: str, shape: list[int], raw: bytes | None = None) -> Change:
    size = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I8": 1, "BOOL": 1}[dtype]
    for n in shape:
        size *= n
    return lambda file: file.tensors.__setitem__(name, [dtype, shape, bytes(size) if raw is None else raw])


def no_blocks(layer: str, block: list[int], rows: int = 1) -> Change:
    """A layer without any block, whose block shape no byte of the file bounds."""

    def change(file: Crafted) -> None:
        file.layer(layer)["block_shape"] = block
        tensor(f"{layer}.values", "F32", [0, *block], b"")(file)
        tensor(f"{layer}.col_indices", "I32", [0], b"")(file)
        tensor(f"{layer}.crow_indices", "I32", [rows + 1])(file)

    return change


def both(*changes: Change) -> Change:
    return lambda file: [change(file) for change in changes]


def swap_tensors(a: str, b: str) -> Change:
    return lambda file: file.tensors.update({a: file.tensors[b], b: file.tensors[a]})


def claim(name: str, shape: list[int], *tables: list[int]) -> Change:
    """A tensor of a compact file of another shape, with tables of one symbol, which take no coded bytes."""

    def change(file: Crafted) -> None:
        file.entry(name).update(shape=shape)
        if tables:
            file.entry(name).update(tables=[*tables])

    return change


HUGE = 2**31
# What asked for memory far beyond the file, or for addresses beyond the tensors, before plans were bounded.
WILD: list[tuple[str, Change, str]] = [
    ("low_rank", put("low_rank", ranks=[10**9]), r"layer 'low_rank': expected tensor 'low_rank\.factors\.0' of shape"),
    (
        "low_rank",
        put("low_rank", weight_shape=[24, 32, 30000, 30000]),
        r"layer 'low_rank': expected tensor .* of shape",
    ),
    (
        "low_rank",
        put("conv2", weight_shape=[32, 32, 30000, 30000]),
        r"layer 'conv2': BSRWeight: expected at most 2\*\*31 block columns",
    ),
    (
        "low_rank",
        put("hidden", weight_shape=[2**31 - 1, 384]),
        r"layer 'hidden': expected tensor 'hidden\.bias' of shape \(2147483647,\)",
    ),
    ("low_rank", put("conv2", stride=[10**9, 1]), r"layer 'conv2': expected into to have stride \(1000000000, 1\)"),
    ("low_rank", put("conv2", stride=[HUGE, 1]), r"LayerPlan 'conv2': expected stride of 2 sizes"),
    ("low_rank", put("conv2", padding=[2**32 - 1, 1], dilation=[2**32 - 1, 1]), r"LayerPlan 'conv2': expected padding"),
    ("low_rank", put("conv2", padding=[9 * 10**6, 1], dilation=[9 * 10**6, 1]), r"layer 'conv2': .* padding \(9000000"),
    (
        "low_rank",
        put("conv2", dilation=[9 * 10**6, 1]),
        r"layer 'conv2': expected into to have dilation \(9000000, 1\)",
    ),
    ("low_rank", put("low_rank", stride=[10**6, 1]), r"layer 'low_rank': expected into to have stride \(1000000, 1\)"),
    ("low_rank", no_blocks("out", [HUGE, 1]), r"LayerPlan 'out': expected block_shape of 2 positive sizes"),
    ("low_rank", no_blocks("out", [2**31 - 1, 1]), r"layer 'out': expected block_shape of a layer of shape \(6, 20\)"),
    ("low_rank", no_blocks("conv2", [1, 2**20], 32), r"layer 'conv2': expected block_shape of a layer of shape"),
    ("low_rank", tensor("steps", "I64", [0, 2**63], b""), r"tensor 'steps': shape: expected at most"),
    ("low_rank", tensor("steps", "I64", [0, 2**40, 2**40], b""), r"tensor 'steps': shape: expected at most"),
    ("low_rank", tensor("steps", "I64", [1] * 65), r"tensor 'steps': shape: expected at most 64 sizes, got 65"),
    ("tucker2", put("linear", ranks=[10**9]), r"layer 'linear': expected ranks up to 12, got \(1000000000,\)"),
    ("training", put("second", mask_block_shape=[HUGE, 1]), r"LayerPlan 'second': expected mask_block_shape of 2"),
    # Compact files: nothing is decoded before it is known to be as long as the model wants it.
    (
        "low_rank int8",
        claim("grouped.weight", [32, 8, 3, 2**30], [0, 32], [0, 32 * 8 * 3 * 2**30]),
        r"'grouped\.weight' of shape \(32, 8, 3, 3\) as in into, got \(32, 8, 3, 1073741824\)",
    ),
    ("low_rank int8", claim("flags", [2**40], [0, 2**40]), r"tensor 'flags' of shape \(2,\) as in into, got"),
    (
        "low_rank int8",
        both(
            put("conv2", weight_shape=[2**31 - 1, 32, 3, 3], block_shape=[1, 1]),
            claim("conv2", [0], [0, (2**31 - 1) * 288]),
            claim("conv2.values", [0, 1, 1], [0, 2**31 - 1], [0]),
        ),
        r"layer 'conv2': expected tensor 'conv2\.bias' of shape",
    ),
    (
        "low_rank int8",
        both(
            put("conv2", block_shape=[2**20, 1]),
            claim("conv2", [288], [1, 288]),
            claim("conv2.values", [288, 2**20, 1], [0, 32], [0, 288 * 2**20]),
        ),
        r"expected tensor 'conv2\.values' of at most \d+ elements in a compact file",
    ),
    (
        "low_rank int8",
        both(
            put("low_rank", ranks=[2**28]),
            claim("low_rank.factors.0", [2**28, 32, 3, 3], [0, 2**28], [0, 2**28 * 288]),
            claim("low_rank.factors.1", [24, 2**28, 1, 1], [0, 24], [0, 24 * 2**28]),
        ),
        r"expected tensor 'low_rank\.factors\.0' of at most \d+ elements in a compact file, which its layer's shape",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), WILD)
def test_wild_sizes_are_refused(base: str, change: Change, message: str, files: Any, tmp_path: Path) -> None:
    file, into, _ = files[base]
    change(file := file.copy())
    assert re.search(message, refusal(file, into, tmp_path / "x"))


LIMITED = """
import sys
sys.path[:0] = {path!r}.split({separator!r})
import tempfile, pathlib
import fuzz_checkpoint, test_crafted_checkpoints as t
from slimkernels import load
folder = pathlib.Path(tempfile.mkdtemp())
files = {{name: (file, into) for name, file, into, _ in t.bases(folder)}}
fuzz_checkpoint.limit_memory()
for base, change, _ in t.WILD:
    file, into = files[base][0].copy(), files[base][1]
    change(file)
    (folder / "x").write_bytes(file.to_bytes())
    try:
        load(folder / "x", into=into)
    except ValueError:
        continue
    raise SystemExit("loaded")
print("refused", len(t.WILD))
"""


def test_wild_sizes_ask_for_no_memory() -> None:
    """With 256 MiB of address space beyond what the process has, every one is refused as it is without a limit."""
    code = LIMITED.format(path=os.pathsep.join([PYTHONPATH, str(TESTS / "files")]), separator=os.pathsep)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["refused", str(len(WILD))]


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        # dtypes and shapes of tensors
        ("low_rank", tensor("conv2.bias", "I8", [32]), r"'conv2\.bias' of dtype torch\.float32, got torch\.int8"),
        (
            "low_rank",
            tensor("hidden.bias", "BF16", [20]),
            r"'hidden\.bias' of dtype torch\.float32, got torch\.bfloat16",
        ),
        ("low_rank", tensor("conv2.bias", "F32", [31]), r"tensor 'conv2\.bias' of shape \(32,\), got \(31,\)"),
        ("low_rank", tensor("conv2.bias", "F32", [1, 32]), r"tensor 'conv2\.bias' of shape \(32,\), got \(1, 32\)"),
        ("low_rank", tensor("low_rank.factors.1", "F64", [24, 6, 1, 1]), r"'low_rank\.factors\.1' of dtype"),
        ("low_rank", put("conv2", dtype="float64"), r"'conv2\.values' of dtype torch\.float64, got torch\.float32"),
        ("low_rank", put("conv2", dtype="int8"), r"LayerPlan 'conv2': expected dtype in float64"),
        ("low_rank", put("grouped", dtype="float16"), r"'grouped\.weight' of dtype torch\.float16, got torch\.float32"),
        (
            "low_rank",
            tensor("steps", "F32", []),
            r"tensor 'steps' of dtype torch\.int64 as in into, got torch\.float32",
        ),
        ("low_rank", tensor("norm.weight", "I32", [24]), r"tensor 'norm\.weight' of dtype torch\.float32 as in into"),
        ("low_rank", tensor("flags", "BOOL", [2], b"\1\2"), r"tensor 'flags': data: expected bytes 0 and 1"),
        (
            "low_rank",
            swap_tensors("conv1.values", "conv2.values"),
            r"layer 'conv1': BSRWeight: expected col_indices of length",
        ),
        (
            "low_rank",
            swap_tensors("conv1.crow_indices", "conv2.crow_indices"),
            r"BSRWeight: expected crow_indices to end at most at",
        ),
        # names
        ("low_rank", lambda file: file.tensors.pop("conv2.bias"), r"tensor 'conv2\.bias' of the plan, got none"),
        ("low_rank", lambda file: file.tensors.pop("norm.bias"), r"tensor 'norm\.bias' of into in the file, got none"),
        ("low_rank", tensor("conv2.weight", "F32", [1]), r"expected into to have tensor 'conv2\.weight' of the file"),
        (
            "low_rank",
            tensor("bn.weight", "F32", [16]),
            r"expected into to have tensor 'bn\.weight' of the file, got none",
        ),
        (
            "low_rank",
            put("conv2", name="conv9"),
            r"layer 'conv9': expected tensor 'conv9\.values' of the plan, got none",
        ),
        ("low_rank", put("grouped", name="grouped.nothing"), r"'grouped\.nothing': .* got no such module"),
        ("low_rank", put("grouped", name="forward"), r"layer 'forward': expected into to have .* got no such module"),
        # actions and the modules that they replace
        ("low_rank", put("bn", type="Conv2d"), r"expected into to have a Conv2d there, got BatchNorm2d"),
        (
            "low_rank",
            put("bn", name="norm", type="GroupNorm"),
            r"layer 'norm': expected into to have a Conv2d or Linear there, got GroupNorm",
        ),
        (
            "low_rank",
            put("relu1", name="norm", type="GroupNorm"),
            r"layer 'norm': expected into to have a ReLU or MaxPool2d there",
        ),
        ("low_rank", put("relu1", into="conv2"), r"epilogue of what was fused into it"),
        ("low_rank", put("relu1", into="grouped"), r"expected into to name a layer of action swap, got 'grouped'"),
        ("low_rank", put("bn", into="hidden"), r"layer 'hidden'|layer 'bn': expected into to have a convolution"),
        ("low_rank", put("bn", into="bn"), r"LayerPlan 'bn': expected into to lead to a layer that stays"),
        ("low_rank", put("bn", into="nothing"), r"LayerPlan 'bn': expected into to name a layer, got 'nothing'"),
        ("low_rank", put("conv1", epilogue="relu"), r"layer 'conv1': expected an epilogue of what was fused into it"),
        ("low_rank", put("conv2", epilogue="relu"), r"layer 'conv2': expected an epilogue of what was fused into it"),
        ("low_rank", put("hidden", epilogue="relu_maxpool2"), r"LayerPlan 'hidden': expected epilogue in"),
        ("low_rank", put("conv2", padding=[0, 0]), r"layer 'conv2': expected into to have padding \(0, 0\) there"),
        ("low_rank", put("conv2", padding=None), r"LayerPlan 'conv2': expected padding of 2 sizes, got None"),
        ("low_rank", put("hidden", stride=[1, 1]), r"LayerPlan 'hidden': expected stride of a convolution alone"),
        ("low_rank", put("grouped", stride=[1, 1]), r"LayerPlan 'grouped': expected stride of a swap alone"),
        ("low_rank", put("grouped", block_shape=[2]), r"LayerPlan 'grouped': expected block_shape of a swap alone"),
        ("low_rank", put("grouped", bias=False), r"layer 'grouped': expected into to have no bias there, got one"),
        ("low_rank", put("grouped", weight_shape=[32, 32, 3, 3]), r"weight of shape \(32, 32, 3, 3\), got \(32, 8, 3"),
        ("low_rank", put("conv2", type="Linear"), r"layer 'conv2': expected into to have a Linear there, got Conv2d"),
        ("low_rank", put("low_rank", kind="tai"), r"layer 'low_rank': expected tensor 'low_rank\.factors\.0' of shape"),
        ("low_rank", put("low_rank", kind="tucker2"), r"LayerPlan 'low_rank': expected 2 positive ranks"),
        ("tucker2", put("linear", kind="tai"), r"LayerPlan 'linear': expected kind in svd, got 'tai'"),
        (
            "low_rank",
            put("conv2", kind="svd"),
            r"LayerPlan 'conv2': expected kind and ranks of format 'low_rank' alone",
        ),
        ("merged", put("vertical", stride=[2, 1]), r"layer 'vertical': expected into to have factors of a layer of"),
        ("merged", put("horizontal", into="low_rank"), r"layer 'low_rank': expected into to have factors"),
        ("low_rank", put("out", channels_last=True), r"LayerPlan 'out': expected channels_last of a dense convolution"),
        # numbers of the wrong type, or no numbers
        ("low_rank", put("conv2", stride=[True, 1]), r"layers\[\d+\]: expected stride to be"),
        ("low_rank", put("conv2", stride=[1.0, 1]), r"layers\[\d+\]: expected stride to be"),
        ("low_rank", put("conv2", stride="11"), r"layers\[\d+\]: expected stride to be"),
        ("low_rank", put("conv2", bytes_stored=10**30), r"layers\[\d+\]: expected bytes_stored to be int, got 1000"),
        ("low_rank", put("conv2", bytes_stored=-1), r"LayerPlan 'conv2': expected bytes_stored in"),
        ("low_rank", put("conv2", sparsity=7), r"LayerPlan 'conv2': expected sparsity in \[0, 1\], got 7"),
        ("low_rank", put("conv2", sparse_ms=[10**400]), r"layers\[\d+\]: expected sparse_ms to be"),
        ("low_rank", put("conv2", reason="\ud800"), r"layers\[\d+\]: expected reason to be str"),
        ("low_rank", lambda file: file.plan.update(threads=0), r"ModelPlan: expected threads >= 1, got 0"),
        ("low_rank", lambda file: file.plan.update(plan_version=True), r"expected plan_version 1, got True"),
        ("low_rank", lambda file: file.meta.update(extra_state="\ud800"), r"header|'extra_state': expected text"),
        # state that is no tensor
        ("low_rank", lambda file: file.meta.update(extra_state='{"steps": 1}'), r"extra_state of what is no tensor"),
        (
            "low_rank",
            lambda file: file.meta.update(extra_state='{"a._extra_state": 1}'),
            r"'a\._extra_state' of the file",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(
    base: str, change: Change, message: str, files: Any, tmp_path: Path
) -> None:
    file, into, _ = files[base]
    change(file := file.copy())
    assert re.search(message, refusal(file, into, tmp_path / "x"))


def plan_text(change: Callable[[str], str]) -> Change:
    return lambda file: setattr(file, "plan_text", change(json.dumps(file.plan)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (plan_text(lambda text: text[:-1] + ', "threads": 1}'), "expected JSON, got a name occurs twice"),
        (plan_text(lambda text: re.sub(r'"sparsity": [^,]*', '"sparsity": NaN', text, count=1)), "got the number NaN"),
        (
            plan_text(lambda text: re.sub(r'"sparsity": [^,]*', '"sparsity": 1e999', text, count=1)),
            "sparsity to be float",
        ),
        (plan_text(lambda text: re.sub(r'"notes": \[', '"notes": [' + "[" * 400 + "]" * 400, text)), "notes to be"),
        (
            plan_text(lambda text: re.sub(r'"notes": \[', '"notes": [' + "[" * 10**5 + "]" * 10**5, text)),
            "expected JSON",
        ),
        (
            plan_text(lambda text: text.replace('"threads": ', '"threads": ' + "9" * 5000)),
            "expected JSON|threads to be",
        ),
    ],
)
def test_what_json_allows_and_a_plan_does_not(change: Change, message: str, files: Any, tmp_path: Path) -> None:
    file, into, _ = files["low_rank"]
    change(file := file.copy())
    text = refusal(file, into, tmp_path / "x")
    assert re.search(message, text) and len(text) < 500
    with pytest.raises(ValueError, match=message):
        explain(tmp_path / "x")


def test_values_that_share_a_tensor_in_into_are_one(files: Any, tmp_path: Path) -> None:
    file, into, _ = files["tucker2"]
    file = file.copy()
    dtype, shape, raw = file.tensors["a.weight"]
    file.tensors["a.weight"] = [dtype, shape, struct.pack("<f", 7.0) + raw[4:]]
    assert "'a.weight' and 'b.weight', which are one in into, to be equal" in refusal(file, into, tmp_path / "x")
    untied = small(2)
    untied.b.weight = nn.Parameter(untied.b.weight.detach().clone())
    (tmp_path / "y").write_bytes(file.to_bytes())
    assert load(tmp_path / "y", into=untied).a.weight[0, 0].item() == 7.0


def test_tied_weights_stay_tied_in_another_dtype(files: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(files["tucker2"][0].to_bytes())
    loaded = load(tmp_path / "x", into=Small().half())
    assert loaded.a.weight is loaded.b.weight and loaded.a.weight.dtype == torch.float32


def test_a_module_under_two_names_is_not_replaced_under_one(files: Any, tmp_path: Path) -> None:
    file, _, _ = files["low_rank"]
    into = residual(3)
    into.twin = into.conv2
    text = refusal(file, into, tmp_path / "x")
    assert text.startswith("layer 'conv2': expected into to have it under one name")


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            {"conv2": nn.Conv2d(32, 32, 3, 2, 1)},
            r"layer 'conv2': expected into to have stride \(1, 1\) there, got \(2, 2\)",
        ),
        ({"conv2": nn.Conv2d(32, 32, 3, padding=2, dilation=2)}, r"layer 'conv2': expected into to have padding"),
        (
            {"conv2": nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")},
            r"layer 'conv2': .*padding_mode='reflect'",
        ),
        ({"conv2": nn.Conv2d(32, 32, 3, padding=1, groups=2)}, r"layer 'conv2': .*groups=2 is not supported"),
        ({"conv2": nn.Conv2d(32, 32, 3, padding=1, bias=False)}, r"layer 'conv2': expected into to have a bias there"),
        ({"conv2": nn.Linear(32, 32)}, r"layer 'conv2': expected into to have a Conv2d there, got Linear"),
        ({"low_rank": nn.Conv2d(32, 24, 3, 1, 1)}, r"layer 'low_rank': expected into to have stride \(2, 2\) there"),
        ({"hidden": nn.Linear(384, 20, bias=False)}, r"layer 'hidden': expected into to have a bias there"),
        ({"bn1": nn.BatchNorm2d(32, track_running_stats=False)}, r"layer 'bn1': .*keeps no running statistics"),
        ({"bn1": nn.BatchNorm2d(16)}, r"layer 'bn1': .*it normalizes 16 channels, the layer before it has 32"),
        ({"relu1": nn.ReLU6()}, r"layer 'relu1': expected into to have a ReLU there, got ReLU6"),
        ({"pool": nn.MaxPool2d(3, 2)}, r"layer 'pool': expected into to have a 2x2 max-pool of stride 2 there"),
        ({"pool": nn.MaxPool2d(2, ceil_mode=True)}, r"layer 'pool': expected into to have a 2x2 max-pool of stride 2"),
        (
            {"grouped": nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)},
            r"layer 'grouped': expected into to have a bias",
        ),
        ({"grouped": nn.Identity()}, r"layer 'grouped': expected into to have a Conv2d there, got Identity"),
        (
            {"vertical": nn.Conv2d(24, 4, (3, 1), (2, 1), (1, 0), bias=False)},
            r"layer 'vertical': expected into to have factors",
        ),
        (
            {"horizontal": nn.Conv2d(4, 24, (1, 3), padding=(0, 1), bias=False)},
            r"layer 'vertical': expected into to have a bias",
        ),
        ({"horizontal": nn.Conv2d(8, 24, (1, 3), padding=(0, 1))}, r"layer 'vertical': expected into to have factors"),
    ],
)
def test_an_architecture_that_differs_in_one_attribute_is_refused(
    replace: dict[str, nn.Module], message: str, files: Any, tmp_path: Path
) -> None:
    into = residual(3)
    for name, module in replace.items():
        setattr(into, name, module)
    texts = [
        refusal(files[base][0], into, tmp_path / "x")
        for base in ("low_rank", "merged")
        if _has(files[base][0], replace)
    ]
    assert texts and all(re.search(message, text) for text in texts)


def _has(file: Crafted, names: Any) -> bool:
    """Whether the file's plan speaks of these layers as it does in the first of the two files."""
    return all(file.layer(name)["action"] != "keep" or name == "grouped" for name in names)


def test_a_module_that_refuses_its_state_is_a_value_error(files: Any, tmp_path: Path) -> None:
    file, into, _ = files["training"]
    state = json.loads(file.meta["extra_state"])
    assert list(state) == ["second.parametrizations.weight.0._extra_state"]
    for value in (None, 3, {}, {"block_shape": [1, 1], "weight_shape": [2]}, {"block_shape": 3, "weight_shape": 4}):
        changed = file.copy()
        changed.meta["extra_state"] = json.dumps({next(iter(state)): value})
        assert refusal(changed, into, tmp_path / "x").startswith("expected a state that into takes, got ")


def test_buffers_that_no_file_holds_must_be_there(files: Any, tmp_path: Path) -> None:
    """On the meta device they have no values, and nothing would ever give them some."""
    file, _, _ = files["low_rank"]
    with torch.device("meta"):
        into = residual_with_table()
    (tmp_path / "x").write_bytes(file.to_bytes())
    with pytest.raises(ValueError, match=r"expected into off the meta device, since 'table' is a buffer that no file"):
        load(tmp_path / "x", into=into)
    assert torch.equal(load(tmp_path / "x", into=residual_with_table()).table, torch.arange(3))


def residual_with_table() -> nn.Module:
    model = Residual()
    model.register_buffer("table", torch.arange(3), persistent=False)
    return model


# What save promises


def test_a_model_cast_since_its_conversion_comes_back_in_its_dtype(tmp_path: Path) -> None:
    fast = convert(sparse_tiny(), policy=force(backend="reference")).to(torch.bfloat16)
    save(fast, tmp_path / "x")
    loaded = load(tmp_path / "x", into=Tiny())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {layer.dtype for layer in explain(tmp_path / "x").plan.layers if layer.dtype} == {"bfloat16"}
    x = images().to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.features[3], "padding", (0, 0)),
            r"features\.3 to have padding \(1, 1\) of its plan, got \(0",
        ),
        (
            lambda m: setattr(m.features[3], "stride", (2, 2)),
            r"features\.3 to have stride \(1, 1\) of its plan, got \(2",
        ),
        (lambda m: setattr(m.features[3], "epilogue", "none"), r"features\.3 to have epilogue relu"),
        (lambda m: setattr(m.features[3], "bias", None), r"features\.3 to have bias True of its plan, got False"),
        (lambda m: setattr(m.features, "4", nn.BatchNorm2d(32)), r"features\.4 to be the Identity of its plan"),
        (lambda m: m.features.__delitem__(8), r"expected the model to have 'features\.8', as in its plan"),
        (
            lambda m: m.features[3].bias.data.__setitem__(slice(None), 0) or _halve(m.features[3]),
            r"dtype torch\.float32",
        ),
    ],
)
def test_a_model_changed_since_its_conversion_is_not_saved(change: Any, message: str, tmp_path: Path) -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    change(fast)
    with pytest.raises(ValueError, match="^save: .*" + message):
        save(fast, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def _halve(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(layer.bias.detach().half())


def test_layers_that_are_sparse_before_the_conversion_keep_their_epilogue(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(4)
        dense = nn.Conv2d(3, 16, 3)
        sparse = BlockSparseConv2d.from_dense(dense, (16, 1), epilogue="relu_maxpool2")
        return nn.Sequential(sparse, nn.Flatten(), BlockSparseLinear.from_dense(nn.Linear(400, 8), (8, 1))).eval()

    fast = convert(fresh(), policy=FORCE)
    assert fast[0].epilogue == "relu_maxpool2"
    save(fast, tmp_path / "x")
    x = images()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "x", into=fresh())(x), fast(x))


def test_models_converted_twice_come_back(tmp_path: Path) -> None:
    once = convert(sparse_tiny(), policy=force(exclude=("features.7", "classifier")))
    twice = convert(once, policy=FORCE)
    save(twice, tmp_path / "x")
    with torch.no_grad():
        for into in (Tiny(), once, twice):
            assert torch.equal(load(tmp_path / "x", into=into)(images()), twice(images()))


def test_hashes_are_of_the_bytes_that_are_there(files: Any, tmp_path: Path) -> None:
    """The helper that these tests write files with agrees with the package about what is hashed."""
    file, _, _ = files["low_rank"]
    hashes = json.loads(file.meta["sha256"])
    dtype, shape, raw = file.tensors["conv2.bias"]
    digest = hashlib.sha256(f"{dtype}{tuple(shape)}".encode())
    digest.update(raw)
    assert hashes["tensor:conv2.bias"] == digest.hexdigest()


def test_the_fuzz_can_make_its_files(tmp_path: Path) -> None:
    """A change to a file takes whatever the changes before it left there, also a nest that no parser takes."""
    files = bases(tmp_path)
    told = [fuzz_checkpoint.crafted(0, case, files)[2] for case in range(4000)]
    assert any(changes.count("extra state") == 2 for changes in told)  # the one that reads what it wrote itself


def test_fuzzed_files(tmp_path: Path) -> None:
    """A short run of the fuzz, in a process of its own: a crash there is a failure here."""
    command = [sys.executable, str(TESTS / "fuzz" / "fuzz_checkpoint.py"), "--cases", "120", "--seed", "7"]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "nothing found" in result.stdout
