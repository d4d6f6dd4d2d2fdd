"""Models of the user's own on the command line, and files that name a packaged architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import slimkernels as sk
from slimkernels.builders import built_on_meta
from slimkernels.cli import app as cli
from slimkernels.cli.own_model import open_model
from slimkernels.models import vgg_digits

OWN = """
import helper
import torch
from torch import nn

import slimkernels as sk

def build(width=32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 32, 3), nn.Flatten(), nn.Linear(512, 10))
    return sk.finalize_(sk.prune_(model, helper.SPARSITY, (16, 1)))

def number():
    return 3

ready = build()
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "my_model.py").write_text(OWN)
    (tmp_path / "helper.py").write_text("SPARSITY = 0.75\n")
    return tmp_path / "my_model.py"


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_a_function_of_the_users_own_is_converted(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.slim.safetensors"
    arguments = ["convert", "--model", f"{own}:build", "--option", "width=48", "--out", out, "--json"]
    data = json.loads(run(*arguments, "--input", "1,3,8,8", "--input", "4x3x8x8").stdout)
    layers = {layer["name"]: layer for layer in data["plan"]["layers"]}
    assert layers["2"]["weight_shape"] == [32, 48, 3, 3] and len(layers["2"]["dense_ms"]) == 2
    assert data["plan"]["builder"] is None
    loaded = sk.load(out, into=torch.nn.Sequential(*_own_layers(48)))
    assert loaded(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    weights = tmp_path / "w.pt"
    torch.save({key: value + 1 for key, value in torch.nn.Sequential(*_own_layers(32)).state_dict().items()}, weights)
    run("convert", weights, "--model", f"{own}:ready", "--without-shapes", "--out", out)
    assert bool((sk.load(out, into=torch.nn.Sequential(*_own_layers(32)))[0].bias > 0.5).all())


@pytest.mark.parametrize(
    ("weights", "stem"),
    [
        ("vgg.0.9.safetensors", "vgg.0.9"),
        ("vgg.0.95.compressed.safetensors", "vgg.0.95"),
        ("net v2.distilled.pt", "net v2"),
        (".hidden.pt", ".hidden"),
    ],
)
def test_files_of_different_names_become_files_of_different_names(
    weights: str, stem: str, own: Path, tmp_path: Path
) -> None:
    """Dots in a name are a part of it: the file of another sparsity is not overwritten."""
    state = torch.nn.Sequential(*_own_layers(32)).state_dict()
    (save_file if weights.endswith(".safetensors") else torch.save)(state, tmp_path / weights)
    assert open_model("convert", tmp_path / weights, f"{own}:build").stem == stem


def _own_layers(width: int) -> list[torch.nn.Module]:
    nn = torch.nn
    return [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 32, 3), nn.Flatten(), nn.Linear(512, 10)]


def test_what_is_wrong_with_ones_own_model_is_said(own: Path, tmp_path: Path) -> None:
    given = ["--input", "1,3,8,8"]
    for model, message in (
        (f"{own}:biuld", "to define 'biuld', got build, number"),
        (f"{tmp_path}/none.py:build", "there is no file"),
        ("no_such_module:build", "No module named 'no_such_module'"),
        (f"{own}:number", "to return an nn.Module, got int"),
    ):
        assert message in run("convert", "--model", model, *given, code=1).stderr
    assert "expected --input SHAPE" in run("convert", "--model", f"{own}:build", code=1).stderr
    assert "--model FILE.py:NAME" in run("convert", code=1).stderr
    wrong = run("convert", "--model", f"{own}:build", "--input", "1,3,a", code=1).stderr
    assert "--input: expected positive sizes as in 1,3,224,224, got '1,3,a'" in wrong
    torch.save({"other": torch.ones(1)}, tmp_path / "w.pt")
    error = run("convert", tmp_path / "w.pt", "--model", f"{own}:build", *given, code=1).stderr
    assert f"expected weights of {own}:build in {tmp_path / 'w.pt'}, got" in error


def test_ones_own_model_is_timed(own: Path) -> None:
    arguments = ["--sparsity", 0.5, "--seconds", 0, "--no-compile", "--no-peers", "--json"]
    data = json.loads(run("bench", "--model", f"{own}:build", "--input", "2,3,8,8", *arguments).stdout)
    assert data["rows"][0]["batch"] == 2 and data["rows"][0]["converted"]["n"] > 0 and data["rows"][0]["recorded"]
    assert "expected --input SHAPE" in run("bench", "--model", f"{own}:build", code=1).stderr
    error = run("bench", "--model", f"{own}:build", "--input", "3,8,8", code=1).stderr
    assert "bench: expected the model to run on --input 3,8,8, whose first size is the batch's, got: " in error
    two = ["--input", "1,3,8,8", "--input", "1,3,9,9"]
    assert "of one image size" in run("bench", "--model", f"{own}:build", *two, code=1).stderr


def test_ones_own_model_is_explained(own: Path, tmp_path: Path) -> None:
    given = ["--model", f"{own}:build", "--input", "2,3,8,8"]
    report = json.loads(run("explain", *given, "--json").stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert report["decided"] == "measured" and len(rows["2"]["dense_ms"]) == 1
    assert "layers swapped" in run("explain", "--model", f"{own}:build", "--without-shapes").stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["helper.py", "my_model.py"]
    for arguments, message in (
        (["--model", f"{own}:build"], "explain: expected --input SHAPE"),
        (["--model", "vgg_digits"], "explain: expected a file of weights, or --model FILE.py:NAME"),
    ):
        assert message in run("explain", *arguments, code=1).stderr
    assert "expected a .slim.safetensors file, or --model" in run("explain", code=2).stderr


def test_files_of_ones_own_model_are_explained_with_it(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.slim.safetensors"
    run("convert", "--model", f"{own}:build", "--input", "2,3,8,8", "--out", out)
    assert run("explain", out, "--model", f"{own}:build").stdout == run("explain", out).stdout
    assert run("explain", out, "--model", f"{own}:build", "--option", "width=48", code=1).stderr
    (tmp_path / "fast.py").write_text(OWN.replace("ready = build()", "ready = sk.convert(build())"))
    assert "layers swapped" in run("explain", "--model", f"{tmp_path / 'fast.py'}:ready").stdout


def test_ones_own_model_is_evaluated(own: Path, tmp_path: Path) -> None:
    (tmp_path / "digits.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    model = ["--model", f"{tmp_path / 'digits.py'}:build"]
    data = json.loads(run("eval", *model, "--input", "32,1,8,8", "--json").stdout)
    assert data["images"] == 450 and 0 <= data["accuracy"] <= 1 and data["file"] is None
    error = run("eval", *model, "--input", "32,3,8,8", code=1).stderr
    assert "eval: expected images of 3x8x8 as --input says, got 1x8x8 in digits" in error
    assert "eval: expected a file of weights, or --model" in run("eval", code=1).stderr


@pytest.fixture
def digits() -> torch.nn.Module:
    model = vgg_digits(width=16).eval()
    sk.finalize_(sk.prune_(model, 0.75, (16, 1)))
    return sk.convert(model, policy=sk.Policy(min_speedup=0))


def test_files_of_packaged_models_load_by_themselves(digits: torch.nn.Module, tmp_path: Path) -> None:
    path, again = tmp_path / "m.slim.safetensors", tmp_path / "again.slim.safetensors"
    sk.save(digits, path, builder={"model": "vgg_digits", "options": {"width": 16}})
    loaded, x = sk.load(path), torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), digits(x))
    sk.save(loaded, again)
    assert torch.equal(sk.load(again)(x), digits(x))  # the name stays with the model
    accuracy = json.loads(run("eval", path, "--data", "digits", "--json").stdout)
    assert accuracy["images"] == 450 and 0 <= accuracy["accuracy"] <= 1
    assert run("eval", path).stdout.startswith("accuracy ")
    assert run("eval", tmp_path / "none", code=1).stderr.startswith("slimkernels: eval: expected a file")
    sk.save(digits, path)
    with pytest.raises(ValueError, match=r"names no model of slimkernels.models \(save\(..., builder=...\) writes"):
        sk.load(path)


@pytest.mark.parametrize(
    "builder",
    [
        {"model": "no_such_network"},
        {"model": "resnet18", "options": {"weights": "DEFAULT"}},
        {"model": "vgg_digits", "options": {"width": [1]}},
        {"model": "vgg_digits", "code": "x"},
        {"model": 3},
        {"model": "vgg_digits", "num_classes": -1},
    ],
)
def test_builders_name_packaged_models_alone(builder: dict, digits: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="builder"):
        sk.save(digits, tmp_path / "m.slim.safetensors", builder=builder)
    assert not list(tmp_path.iterdir())


def test_a_builder_of_enormous_sizes_takes_no_memory() -> None:
    model = built_on_meta('{"model": "vgg19_cifar", "options": {"width": 1000}}')
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="expected builder to be JSON"):
        built_on_meta("[")


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "slimkernels", "-h"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "eval" in done.stdout and "--show-completion" in done.stdout


def test_dir_shows_the_interface_alone() -> None:
    assert dir(sk) == sorted(sk.__all__)
