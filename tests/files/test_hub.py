"""A converted model is not published in a form that its class would read wrongly; copies of it compute the same."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import FORCE, Tiny, force, images, sparse_tiny
from safetensors.torch import load_model, save_model
from torch import nn

import slimkernels
from slimkernels import convert, load, save
from slimkernels.conversion.hub import PublishGuard


class HubMixin:
    """huggingface_hub's interface: the writer calls `_save_pretrained`, the reader loads what fits."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._save_pretrained(folder)

    def _save_pretrained(self, folder: Path) -> None:
        save_model(self, str(folder / "model.safetensors"))  # type: ignore[arg-type]

    def push_to_hub(self, folder: Path) -> None:
        self.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Any:
        model = cls()
        load_model(model, str(folder / "model.safetensors"), strict=False)  # type: ignore[arg-type]
        return model.eval()  # type: ignore[attr-defined]


for method in (HubMixin.save_pretrained, HubMixin._save_pretrained, HubMixin.push_to_hub):
    method.__module__ = "huggingface_hub.hub_mixin"  # inherited from another package, as there


class HubTiny(Tiny, HubMixin):
    """A model that can be published."""


def sparse(cls: type[nn.Module]) -> Any:
    model = cls()
    model.load_state_dict(sparse_tiny().state_dict())
    return model.eval()


def computes_the_same(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(a(images()), b(images()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["save_pretrained", "_save_pretrained", "push_to_hub"])
def test_a_converted_model_is_not_written_for_from_pretrained(method: str, training: bool, tmp_path: Path) -> None:
    fast = convert(sparse(HubTiny), policy=FORCE, training=training)
    with pytest.raises(
        ValueError, match=rf"^{method}: .* HubTiny .* slimkernels\.load\(path, into=HubTiny\(\.\.\.\)\)"
    ):
        getattr(fast, method)(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_guard_the_numbers_would_be_wrong(tmp_path: Path) -> None:
    """What is guarded against, shown."""
    fast = convert(sparse(HubTiny), policy=FORCE)
    HubMixin.save_pretrained.__get__(_unguarded(fast))(tmp_path / "out")
    assert not computes_the_same(HubTiny.from_pretrained(tmp_path / "out"), fast)


def _unguarded(model: nn.Module) -> nn.Module:
    for name in [n for n, v in vars(model).items() if isinstance(v, PublishGuard)]:
        del model.__dict__[name]
    return model


def test_the_way_out_that_the_message_names(tmp_path: Path) -> None:
    fast = convert(sparse(HubTiny), policy=FORCE)
    save(fast, tmp_path / "model.slim.safetensors")
    loaded = load(tmp_path / "model.slim.safetensors", into=HubTiny())
    assert computes_the_same(loaded, fast)
    with pytest.raises(ValueError, match=r"^save_pretrained: "):
        loaded.save_pretrained(tmp_path / "out")
    again = convert(loaded, policy=FORCE)
    with pytest.raises(ValueError, match=r"^save_pretrained: "):
        again.save_pretrained(tmp_path / "out")
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"^save: expected a name that from_pretrained does not read"):
            save(fast, tmp_path / name)
    save(convert(sparse_tiny(), policy=FORCE), tmp_path / "model.safetensors")  # nothing reads that by its name


def test_what_was_not_changed_is_published_as_before(tmp_path: Path) -> None:
    kept = convert(sparse(HubTiny), policy=force(exclude=("features", "classifier"), fold_bn=False))
    kept.save_pretrained(tmp_path / "out")
    assert computes_the_same(HubTiny.from_pretrained(tmp_path / "out"), kept)
    original = sparse(HubTiny)
    convert(original, policy=FORCE)
    original.save_pretrained(tmp_path / "out")
    assert computes_the_same(HubTiny.from_pretrained(tmp_path / "out"), original)


def test_a_part_that_can_be_published_by_itself_is_guarded_too(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("net", sparse(HubTiny))
    model.add_module("other", sparse(HubTiny))
    fast = convert(model, policy=force(exclude=("other",), fold_bn=False))
    with pytest.raises(ValueError, match=r"^save_pretrained: "):
        fast.net.save_pretrained(tmp_path / "out")
    fast.other.save_pretrained(tmp_path / "out")
    assert computes_the_same(HubTiny.from_pretrained(tmp_path / "out"), fast.other)


class OwnFormat(Tiny, HubMixin):
    """A class that writes and reads converted models itself."""

    def _save_pretrained(self, folder: Path) -> None:
        save(self, folder / "model.slim.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> nn.Module:
        return load(folder / "model.slim.safetensors", into=cls())


def test_a_writer_of_the_class_s_own_is_used(tmp_path: Path) -> None:
    fast = convert(sparse(OwnFormat), policy=FORCE)
    fast.save_pretrained(tmp_path / "out")
    assert computes_the_same(OwnFormat.from_pretrained(tmp_path / "out"), fast)


class Wrapped(HubTiny):
    """Adds something around the inherited writer."""

    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)


def test_a_wrapper_of_the_inherited_writer_is_guarded(tmp_path: Path) -> None:
    fast = convert(sparse(Wrapped), policy=FORCE)
    for method in ("save_pretrained", "push_to_hub"):
        with pytest.raises(ValueError, match=r"^_save_pretrained: "):
            getattr(fast, method)(tmp_path / "out")


def test_copies_and_pickles_of_a_converted_model_compute_the_same_and_stay_guarded(tmp_path: Path) -> None:
    fast = convert(sparse(HubTiny), policy=FORCE)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert computes_the_same(twin, fast)
        with pytest.raises(ValueError, match=r"^save_pretrained: "):
            twin.save_pretrained(tmp_path / "out")
        with pytest.warns(UserWarning, match="converted for inference"):
            twin.train()
    with pytest.raises(RuntimeError, match="Missing key"):
        HubTiny().load_state_dict(fast.state_dict())


def test_with_huggingface_hub_itself(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    class Published(Tiny, hub.PyTorchModelHubMixin):  # type: ignore[name-defined, misc]
        pass

    model = sparse(Published)
    model.save_pretrained(tmp_path / "dense")
    assert computes_the_same(Published.from_pretrained(tmp_path / "dense"), model)
    fast = convert(model, policy=FORCE)
    for method in ("save_pretrained", "push_to_hub"):
        with pytest.raises(ValueError, match=rf"^{method}: expected a Published with the layers of its class"):
            getattr(fast, method)(tmp_path / "fast")
    assert not (tmp_path / "fast").exists()

    class Own(Tiny, hub.PyTorchModelHubMixin):  # type: ignore[name-defined, misc]
        def _save_pretrained(self, save_directory: Path) -> None:
            save(self, save_directory / "model.slim.safetensors")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> nn.Module:
            return load(Path(model_id) / "model.slim.safetensors", into=cls())

    fast = convert(sparse(Own), policy=FORCE)
    fast.save_pretrained(tmp_path / "own")
    assert computes_the_same(Own.from_pretrained(tmp_path / "own"), fast)


def test_the_recipe_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/leaving.md, as it stands there: a converted and a plain model, from a folder and from the hub."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    text = (Path(__file__).resolve().parents[2] / "docs/leaving.md").read_text()
    start = text.index("```\nimport os\n") + len("```\n")
    fetched: list[dict[str, Any]] = []

    def download(repo: str, name: str, **options: Any) -> str:
        fetched.append({"repo": repo, **options})
        if repo == "someone/plain":
            raise hub.errors.EntryNotFoundError(name)
        return str(tmp_path / "converted" / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(
        sys.modules[hub.PyTorchModelHubMixin.__module__],  # where the mixin itself asks for the configuration
        "hf_hub_download",
        lambda repo_id, filename, **_: str(tmp_path / "converted" / filename),
    )
    scope: dict[str, Any] = {"__name__": __name__}
    exec(text[start : text.index("```", start)], scope)
    torch.manual_seed(0)
    model, x = scope["Net"](classes=7).eval(), torch.randn(2, 3, 32, 32)
    slimkernels.finalize_(slimkernels.prune_(model, 0.875, (16, 1)))
    fast = convert(model, policy=FORCE)
    for name, network in (("converted", fast), ("plain", model)):
        network.save_pretrained(tmp_path / name)
        again = scope["Net"].from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(again(x), network(x)) and again(x).shape == (2, 7)
    assert slimkernels.explain(scope["Net"].from_pretrained(tmp_path / "converted")).plan.swapped
    from_hub = scope["Net"].from_pretrained("someone/net", revision="v1")
    with torch.no_grad():
        assert torch.equal(from_hub(x), fast(x))
    assert fetched[-1]["repo"] == "someone/net" and fetched[-1]["revision"] == "v1"
    read: list[dict[str, Any]] = []
    monkeypatch.setattr(
        hub.PyTorchModelHubMixin, "_from_pretrained", classmethod(lambda cls, **k: read.append(k) or model)
    )
    scope["Net"].from_pretrained("someone/plain")
    assert read[0]["model_id"] == "someone/plain"  # left to the mixin's own reader
