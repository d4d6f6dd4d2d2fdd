"""Weight files: round trips through the header, every refusal, and files that are complete or absent."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimkernels.cli.weights import load_model, read_weights, write_weights
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.files import atomic_path
from slimkernels.models import vgg_digits


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_round_trip(tmp_path):
    model, path = vgg_digits(num_classes=7, width=16), tmp_path / "model.safetensors"
    write_weights(model, path, name="vgg_digits", num_classes=7, notes={"accuracy": 0.5})
    with pytest.raises(ValueError, match="expected weights of vgg_digits"):
        load_model(path)  # the default width does not fit
    model = vgg_digits(num_classes=7)
    write_weights(model, path, name="vgg_digits", num_classes=7, notes={"accuracy": 0.5})
    loaded, name, classes, description = load_model(path)
    assert equal(model, loaded) and not loaded.training
    assert (name, classes, description.notes) == ("vgg_digits", 7, {"accuracy": 0.5})


@pytest.mark.parametrize("method", ["svd", "tai", "tucker2"])
def test_factorized_round_trip(tmp_path, method):
    model, path = vgg_digits(), tmp_path / "model.safetensors"
    factorize_(model, method, rank=8, layers=["features.7", "classifier.0"])
    write_weights(model, path, name="vgg_digits", num_classes=10)
    loaded, *_ = load_model(path)
    x = torch.randn(2, 1, 8, 8)
    assert equal(model, loaded) and torch.equal(model.eval()(x), loaded(x))


def test_torch_files(tmp_path):
    model, path = vgg_digits(), tmp_path / "model.pt"
    for wrap in (
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ):
        torch.save(wrap(model.state_dict()), path)
        assert equal(model, load_model(path, "vgg_digits")[0])


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


def test_refusals(tmp_path):
    model, path = vgg_digits(), tmp_path / "model.safetensors"
    write_weights(model, path, name="vgg_digits", num_classes=10)
    with pytest.raises(ValueError, match=r"expected model 'vgg_digits' as .* says, got 'nin_cifar'"):
        load_model(path, "nin_cifar")
    with pytest.raises(ValueError, match=r"expected 10 classes as .* says, got 3"):
        load_model(path, num_classes=3)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt, which does not exist"):
        read_weights(tmp_path / "nowhere.pt")
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(3)}, str(bare))
    with pytest.raises(ValueError, match=r"expected a model name, since .* does not carry one"):
        load_model(bare)
    with pytest.raises(ValueError, match=r"got missing 'features\.0\.weight' and \d+ more differences"):
        load_model(bare, "vgg_digits")
    bare.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected safetensors, got the damaged .*bare\.safetensors"):
        read_weights(bare)
    save_file({"weight": torch.zeros(3)}, str(bare), metadata={"slimkernels.weights": '{"low_rank": 3}'})
    with pytest.raises(ValueError, match=r"expected JSON under 'slimkernels\.weights'"):
        read_weights(bare)
    save_file({"weight": torch.zeros(3)}, str(bare), metadata={"format": "slimkernels"})
    with pytest.raises(ValueError, match="a converted one"):
        read_weights(bare)


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"got the unreadable .*model\.pt"):
        read_weights(path)
    torch.save({"weight": torch.zeros(2), "lr": 3}, path)
    with pytest.raises(ValueError, match="expected a state_dict of tensors"):
        read_weights(path)


def test_masks_must_be_baked_in(tmp_path):
    model, path = prune_(vgg_digits(width=16), 0.5, (16, 1)), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="finalize_ first"):
        write_weights(model, path, name="vgg_digits", num_classes=10)
    assert not path.exists()
    write_weights(finalize_(model), path, name="vgg_digits", num_classes=10)
    assert not any("parametrizations" in key for key in read_weights(path)[0])


def test_atomic_path(tmp_path):
    target = tmp_path / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("second")
        raise RuntimeError
    assert target.read_text() == "first" and os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "missing" / "file.txt"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_get_the_permissions_of_the_umask(tmp_path):
    target = tmp_path / "file.safetensors"
    before = os.umask(0o022)
    try:
        write_weights(nn.Linear(2, 2), target, name="linear", num_classes=2)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
