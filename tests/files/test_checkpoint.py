"""save and load: exact round trips, and every damaged file refused with the field at fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import FORCE, Tiny, block_sparse_, force, images, randomize_batch_norm_, sparse_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from slimkernels import Policy, convert, explain, load, save
from slimkernels.conversion import container, measure
from slimkernels.formats import BlockMask, block_mask
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d, LowRankLinear


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small converted model and its file."""
    fast = convert(sparse_tiny(), policy=FORCE)
    path = tmp_path_factory.mktemp("saved") / "tiny.slim.safetensors"
    save(fast, path)
    return path, fast


def same(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    with torch.no_grad():
        assert torch.equal(a(x), b(x))
    assert explain(a).plan == explain(b).plan
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]) and value.dtype == other[name].dtype


# Round trips


def test_round_trip_into_a_fresh_model(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    into = Tiny().train()
    before = {k: v.clone() for k, v in into.state_dict().items()}
    loaded = load(path, into=into)
    same(loaded, fast)
    assert type(loaded) is Tiny and not loaded.training and into.training
    assert all(torch.equal(v, into.state_dict()[k]) for k, v in before.items())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in fast.parameters()]
    with pytest.warns(UserWarning, match="converted for inference"):
        loaded.train()


def test_the_file_is_safetensors_without_packs_and_smaller_than_dense(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    tensors = load_file(path)
    assert tensors.keys() == fast.state_dict().keys() and not any("packed" in name for name in tensors)
    assert os.path.getsize(path) < 4 * sum(p.numel() for p in Tiny().parameters()) * 0.8 + 20_000
    assert explain(path).file_bytes == os.path.getsize(path)
    assert explain(path).plan == explain(fast).plan and f"file: {os.path.getsize(path)} bytes" in str(explain(path))


INTO: dict[str, Callable[[], nn.Module]] = {
    "pruned": lambda: _pruned(sparse_tiny(3)),
    "masked": lambda: _masked(sparse_tiny(3)),
    "converted": lambda: convert(sparse_tiny(3), policy=FORCE),
    "meta": lambda: _on_meta(),
    "half": lambda: Tiny().half(),
}


def _pruned(model: nn.Module) -> nn.Module:
    for name in ("features.3", "classifier.0"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    return model


def _masked(model: nn.Module) -> nn.Module:
    layer = model.get_submodule("features.3")
    parametrize.register_parametrization(
        layer, "weight", BlockMask(block_mask(layer.weight, (16, 1)), layer.weight.shape, (16, 1))
    )
    return model


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return Tiny()


@pytest.mark.parametrize("name", INTO)
def test_into_any_state_of_the_architecture(name: str, saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    same(load(path, into=INTO[name]()), fast)


def test_measured_kept_grouped_and_untraceable_models(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16),
            nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16, track_running_stats=False),
        )  # fmt: skip
        randomize_batch_norm_(nn.Sequential(*list(model)[:6]))
        return model

    for policy in (Policy(repeats=1, budget_s=0), Policy(exclude=("2",)), force(exclude=("5",)), FORCE):
        fast = convert(fresh(), images(channels=4), policy=policy)
        save(fast, tmp_path / "m.slim.safetensors")
        same(load(tmp_path / "m.slim.safetensors", into=fresh()), fast, images(channels=4))
    assert load(tmp_path / "m.slim.safetensors", into=fresh())[0].bias is not None


@pytest.mark.parametrize("merged", [False, True])
def test_low_rank_and_merged_chains(merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(12, 4, (3, 1), bias=False), nn.Conv2d(4, 20, (1, 3)), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(),
            nn.Linear(20 * 16, 6), nn.Linear(6, 40),
        ).eval()  # fmt: skip

    def clock(runs: list[Any], **kwargs: Any) -> list[float]:
        return [3.0, 2.0, 1.0] if not hasattr(runs[0], "module") else [1.0, 0.5, 0.1 if merged else 0.9][: len(runs)]

    monkeypatch.setattr(measure, "typical_seconds", clock)
    x = images(channels=12, size=6)
    fast = convert(fresh(), x)
    assert isinstance(fast[0], nn.Conv2d if merged else LowRankConv2d)
    assert isinstance(fast[5], nn.Linear if merged else LowRankLinear)
    save(fast, tmp_path / "c.slim.safetensors")
    same(load(tmp_path / "c.slim.safetensors", into=fresh()), fast, x)


def test_training_conversions_with_masks_resume(tmp_path: Path) -> None:
    model = _masked(sparse_tiny())
    trained = convert(model, policy=force(exclude=("features.3",)), training=True)
    trained(images()).sum().backward()
    save(trained, tmp_path / "t.slim.safetensors")
    loaded = load(tmp_path / "t.slim.safetensors", into=Tiny())
    assert loaded.training and parametrize.is_parametrized(loaded.features[3], "weight")
    assert loaded.features[7].values.requires_grad
    same(loaded.eval(), trained.eval())
    zero = model.features[3].weight == 0
    assert (loaded.features[3].weight[zero] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    fast = convert(sparse_tiny().to(dtype), policy=force(backend="reference"))
    assert isinstance(fast.features[3], BlockSparseConv2d)
    save(fast, tmp_path / "d.slim.safetensors")
    loaded = load(tmp_path / "d.slim.safetensors", into=Tiny())
    same(loaded, fast, images().to(dtype))


def test_tied_weights_and_extra_state(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        def get_extra_state(self) -> dict[str, Any]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.loaded = state

    def fresh() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Versioned(16, 16))
        model[1].weight = model[0].weight
        return model

    fast = convert(fresh(), policy=FORCE)
    save(fast, tmp_path / "x.slim.safetensors")
    loaded = load(tmp_path / "x.slim.safetensors", into=fresh())
    assert loaded[1].weight is loaded[0].weight and loaded[2].loaded == {"version": 3}
    same(loaded, fast, torch.ones(2, 16))


def test_a_tied_kernel_that_is_missing_here_becomes_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = convert(sparse_tiny(), policy=force(backend="reference"))
    assert fast.features[3].kernel == "bsr_conv2d__reference"
    save(fast, tmp_path / "k.slim.safetensors")
    assert load(tmp_path / "k.slim.safetensors", into=Tiny()).features[3].kernel == "bsr_conv2d__reference"
    fast.slimkernels_plan = type(explain(fast).plan).from_json(
        explain(fast).plan.to_json().replace("bsr_conv2d__reference", "bsr_conv2d__nowhere")
    )
    save(fast, tmp_path / "k.slim.safetensors")
    assert load(tmp_path / "k.slim.safetensors", into=Tiny()).features[3].kernel == "auto"


def test_an_interrupted_save_leaves_the_file_before_it(
    saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.slim.safetensors"
    shutil.copy(saved[0], path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(saved[1], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# Wrong arguments


def test_save_checks_its_arguments(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^save: expected an nn\.Module, got int"):
        save(3, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^save: expected a model from slimkernels\.convert, got a plain Tiny"):
        save(Tiny(), tmp_path / "x")
    fast = convert(sparse_tiny(), policy=FORCE)
    fast.features[3] = nn.Conv2d(16, 32, 3)
    with pytest.raises(
        ValueError, match=r"^save: expected features\.3 to be the BlockSparseConv2d of its plan, got Conv2d"
    ):
        save(fast, tmp_path / "x")
    fast = convert(sparse_tiny(), policy=FORCE)
    fast.register_buffer("odd", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^save: expected a dense tensor, got 'odd' of torch\.complex64"):
        save(fast, tmp_path / "x")
    with pytest.raises(OSError):
        save(saved[1], tmp_path / "no" / "folder.slim.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_extra_state_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(TypeError, match=r"^save: expected extra state that JSON can hold, got '0\._extra_state'"):
        save(convert(nn.Sequential(Odd(4, 4)), policy=FORCE), tmp_path / "x")


def test_load_checks_into(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = saved
    with pytest.raises(
        ValueError, match=r"^load: expected into=<a model of the architecture .* such as into=vgg19\(\)"
    ):
        load(path)
    with pytest.raises(TypeError, match=r"^load: expected into to be an nn\.Module, got str"):
        load(path, into="tiny")  # type: ignore[arg-type]
    with pytest.raises(OSError):
        load(tmp_path / "nothing", into=Tiny())
    with pytest.raises(
        ValueError, match=r"layer 'features\.0': expected into to have a Conv2d there, got no such module"
    ):
        load(path, into=nn.Sequential(nn.Linear(2, 2)))
    wider = Tiny()
    wider.features[3] = nn.Conv2d(16, 48, 3, padding=1)
    with pytest.raises(
        ValueError,
        match=r"layer 'features\.3': expected into to have weight_shape \(32, 16, 3, 3\) there, got \(48, 16, 3, 3\)",
    ):
        load(path, into=wider)
    other = Tiny()
    other.features[4] = nn.GroupNorm(2, 32)
    with pytest.raises(
        ValueError, match=r"layer 'features\.4': expected into to have a BatchNorm2d there, got GroupNorm"
    ):
        load(path, into=other)
    more = Tiny()
    more.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^load: .*expected tensor 'extra\.bias' of into in the file, got none"):
        load(path, into=more)
    kept = convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), policy=Policy())
    save(kept, tmp_path / "kept.slim.safetensors")
    with pytest.raises(ValueError, match=r"expected tensor '1\.weight' of shape \(3,\) as in into, got \(4,\)"):
        load(tmp_path / "kept.slim.safetensors", into=nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"^load: .*expected into to have tensor '1\.bias' of the file, got none"):
        load(tmp_path / "kept.slim.safetensors", into=nn.Sequential(nn.Linear(4, 4), nn.Identity()))


# Damage


def sections(data: bytes) -> dict[str, tuple[int, int]]:
    """Byte ranges of the file's regions."""
    start = 8 + int.from_bytes(data[:8], "little")
    return {"header length": (0, 8), "header": (8, start), "data": (start, len(data))}


def refused(path: Path, data: bytes) -> str:
    """The message with which a damaged file is refused; a message must name what is at fault."""
    path.write_bytes(data)
    into = Tiny()
    with pytest.raises(ValueError, match=r"^load: ") as error:
        load(path, into=into)
    text = str(error.value).split(f"{path}: ", 1)[1]
    assert text.split(":")[0].split(" ")[0] in ("header", "metadata", "tensor", "file"), text
    return text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the smallest file with a sparse layer, a folded batch norm and a kept layer."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    block_sparse_(model[0], (8, 1))
    path = tmp_path_factory.mktemp("small") / "s.slim.safetensors"
    save(convert(model, policy=force(exclude=("1",))), path)
    return path.read_bytes()


def test_flipped_bits_all_over_the_header_are_refused(small: bytes, tmp_path: Path) -> None:
    """Every seventh byte of the header with one bit flipped; the bit rotates, as 7 and 8 have no common factor."""
    begin, end = sections(small)["header"]
    path = tmp_path / "x"
    for position in range(begin, end, 7):
        broken = bytearray(small)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"^load: "):
            container.read(path)


@pytest.mark.parametrize("region", ["header length", "header", "data"])
def test_flipped_bytes_are_refused_with_the_field(region: str, small: bytes, tmp_path: Path) -> None:
    begin, end = sections(small)[region]
    for position in sorted({begin, (begin + end) // 2, end - 1, *range(begin, min(end, begin + 8))}):
        for mask in (0x01, 0x80, 0xFF):
            broken = bytearray(small)
            broken[position] ^= mask
            text = refused(tmp_path / "x", bytes(broken))
            if region == "data":
                assert text.startswith("tensor '") and "SHA-256" in text


def test_truncated_and_extended_files_are_refused(small: bytes, tmp_path: Path) -> None:
    start = sections(small)["data"][0]
    for size in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(small) - 1):
        refused(tmp_path / "x", small[:size])
    assert refused(tmp_path / "x", small + b"\0").startswith("file size: expected")


def rewritten(small: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header, its length put right."""
    start = sections(small)["data"][0]
    header = json.loads(small[8:start])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + small[start:]


def set_meta(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({name: value})


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["0.values"].update(changes)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("__metadata__"), "header field '__metadata__': expected an object"),
        (set_meta("format", "other"), "metadata field 'format': expected 'slimkernels', got 'other'"),
        (set_meta("format_version", "3"), "metadata field 'format_version': expected '1' or '2', got '3'"),
        (set_meta("format_version", "2"), "metadata: expected the fields format, format_version, sha256, got"),
        (set_meta("plan", "{}"), "metadata field 'plan': expected SHA-256"),
        (set_meta("extra_state", "{ }"), "metadata field 'extra_state': expected SHA-256"),
        (set_meta("sha256", "{}"), "metadata field 'plan': expected SHA-256 None"),
        (set_meta("sha256", "[]"), "metadata field 'sha256': expected a JSON object, got list"),
        (set_meta("sha256", '{"a":1,"a":2}'), "metadata field 'sha256': expected JSON, got a name occurs twice"),
        (set_meta("plan", 3), "metadata field 'plan': expected a string, got int"),
        (set_meta("note", "hello"), "metadata: expected the fields"),
        (entry(dtype="F8"), "tensor '0.values': dtype: expected one of F64"),
        (entry(dtype=["F32"]), "tensor '0.values': dtype: expected one of F64"),
        (entry(shape=[1]), "tensor '0.values': data_offsets: expected 4 bytes"),
        (entry(shape=[-1]), "tensor '0.values': shape: expected non-negative integers"),
        (entry(shape=[True]), "tensor '0.values': shape: expected non-negative integers"),
        (entry(data_offsets=[0]), "tensor '0.values': data_offsets: expected 2 numbers"),
        (entry(extra=1), "tensor '0.values': expected dtype, shape and data_offsets"),
        (lambda header: header.update({"0.values": 3}), "tensor '0.values': expected dtype, shape and data_offsets"),
        (drop("0.values"), "data_offsets: expected begin at"),
    ],
)
def test_a_changed_header_is_refused_with_the_field(
    change: Callable[[dict[str, Any]], None], message: str, small: bytes, tmp_path: Path
) -> None:
    assert message in refused(tmp_path / "x", rewritten(small, change))


def test_a_deep_or_foreign_header_is_refused(tmp_path: Path, small: bytes) -> None:
    deep = b"[" * 50_000
    assert refused(tmp_path / "x", len(deep).to_bytes(8, "little") + deep).startswith("header: expected")
    bad = b"\xff\xfe}"
    assert refused(tmp_path / "x", len(bad).to_bytes(8, "little") + bad).startswith("header: expected UTF-8")
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    assert "'__metadata__'" in refused(tmp_path / "x", (tmp_path / "x").read_bytes())


def resaved(saved: tuple[Path, nn.Module], path: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """A file with right hashes whose tensor ``name`` is another one: what only the format's rules can refuse."""
    state = dict(saved[1].state_dict())
    value = change(state[name].clone())
    if value is None:
        del state[name]
    else:
        state[name] = value
    container.write(path, explain(saved[1]).plan, state)


def _spoiled(index: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("col_indices", _spoiled(0, 10**6), r"layer 'features\.3': BSRWeight: expected col_indices in \[0, 144\)"),
        ("col_indices", _spoiled(0, -1), r"layer 'features\.3': BSRWeight: expected col_indices in \[0, 144\), got -1"),
        ("col_indices", lambda t: t.flip(0), r"layer 'features\.3': BSRWeight: expected"),
        (
            "col_indices",
            lambda t: t.long(),
            r"layer 'features\.3': BSRWeight: expected col_indices of dtype torch.int32",
        ),
        ("crow_indices", _spoiled(-1, 10**6), r"layer 'features\.3': BSRWeight: expected crow_indices to end"),
        ("crow_indices", lambda t: t[:-1], r"layer 'features\.3': BSRWeight: expected crow_indices of length 3, got 2"),
        ("values", lambda t: t[:, :8], r"layer 'features\.3': BSRWeight: expected contiguous values of shape"),
        (
            "values",
            lambda t: t.int(),
            r"layer 'features\.3': expected tensor .* of dtype torch\.float32, got torch\.int32",
        ),
        ("bias", lambda t: t[:-1], r"tensor 'features\.3\.bias' of shape \(32,\), got \(31,\)"),
        ("values", lambda t: None, r"expected tensor 'features\.3\.values' of the plan, got none"),
    ],
)
def test_a_pattern_that_breaks_the_format_is_refused(
    name: str, change: Callable[[Tensor], Tensor | None], message: str, saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    resaved(saved, tmp_path / "x", f"features.3.{name}", change)
    with pytest.raises(ValueError, match=r"^load: .*" + message):
        load(tmp_path / "x", into=Tiny())


def test_explain_refuses_a_damaged_file_too(small: bytes, tmp_path: Path) -> None:
    broken = bytearray(small)
    broken[small.index(b"block_shape")] ^= 1
    (tmp_path / "x").write_bytes(broken)
    with pytest.raises(ValueError, match="metadata field 'plan': expected SHA-256"):
        explain(tmp_path / "x")
