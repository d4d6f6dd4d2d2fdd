"""What the package says when something is wrong, or takes long: whole sentences, each with a way on."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import BACKEND, FORCE, Tiny, images, sparse_tiny
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.cli import options
from slimkernels.compress.training.config import EpochStats, epoch_line
from slimkernels.recipes import sources

needs_native = pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")


class TiedHead(nn.Module):
    """A language model's embedding and head, which share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(128, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 128, bias=False),
        )
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 4))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a number as block shape": (
        lambda: sk.prune_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.5, 16),  # type: ignore[arg-type]
        r"^prune_: expected block_shape .* got the number 16; such as \(16, 1\) or \(16, 16\)$",
    ),
    "a number for a layer's block shape": (
        lambda: sk.prune_(nn.Sequential(nn.Linear(64, 64)), 0.5, {"0": 8}),  # type: ignore[dict-item]
        r"^prune_: expected block_shape .* got the number 8; such as \(8, 1\) or \(8, 8\)$",
    ),
    "one block shape where several are expected": (
        lambda: sk.Policy(block_shapes=(16, 1)),  # type: ignore[arg-type]
        r"^Policy: expected block_shapes to be several shapes .* got one, \(16, 1\); write \(\(16, 1\),\)$",
    ),
    "no layer left by the rules": (
        lambda: sk.prune_(narrow(), 0.5, (4, 1)),
        r"^prune_: .* got none that a call without names takes \(0: the first convolution \(skip_first\); 1: groups=8; "
        r"3: a Linear of fewer than 64 features\); name layers to prune them all the same, as in layers=\['0', '3'\]$",
    ),
    "no layer left by exclude": (
        lambda: sk.prune_(narrow(), 0.5, (4, 1), exclude="*"),
        r"^prune_: expected at least one Conv2d or Linear to prune, got none after the exclusions$",
    ),
    "no layer in the model": (
        lambda: sk.prune_(nn.ReLU(), 0.5, (4, 1)),
        r"^prune_: expected at least one Conv2d or Linear to prune, got a model without any$",
    ),
    "the classifier alone": (
        lambda: sk.prune_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(64, 64)), 0.5, (4, 1)),
        r"1: the last Linear, the classifier\); name layers to prune them all the same",
    ),
    "a tied head": (
        lambda: sk.prune_(TiedHead(), 0.5, (16, 1), layers=["head"]),
        r"got one shared by \['embedding', 'head'\]: zeros would appear in both; leave it out with exclude=\['head'\]$",
    ),
    "Policy.exclude that matches nothing": (
        lambda: sk.convert(sparse_tiny(), policy=sk.Policy(exclude=("feature.*",))),
        r"^convert: expected Policy.exclude to name layers of the model, got 'feature.\*'; near matches: features\.\d",
    ),
    "explain of a plain model": (
        lambda: sk.explain(nn.Linear(2, 2)),
        r"got a plain Linear; convert it first, or look at it with slimkernels.analyze\(model\)$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_way_on(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tied_head_stays_and_the_report_says_why() -> None:
    model, tokens = TiedHead().eval(), torch.randint(0, 128, (2, 8))
    sk.prune_(model, 0.5, (16, 1), layers=["hidden"])
    fast = sk.convert(model, tokens, policy=FORCE)
    assert fast.head.weight is fast.embedding.weight
    assert sk.explain(fast).plan["head"].reason == "its weight is shared with another layer"


def test_policy_exclude_takes_names_containers_and_patterns() -> None:
    def kept(*exclude: str) -> set[str]:
        layers = sk.convert(sparse_tiny(), policy=sk.Policy(exclude=exclude, min_speedup=0)).slimkernels_plan.layers
        return {layer.name for layer in layers if layer.reason == "excluded by the policy"}

    every = {"features.0", "features.3", "features.7", "classifier.0", "classifier.3"}
    assert kept("features.3") == {"features.3"} and kept("classifier") == {"classifier.0", "classifier.3"}
    assert kept("features.?") == {"features.0", "features.3", "features.7"} and kept("*.[07]", "*.3") == every


def test_foreign_files_are_named_as_such(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights, text = tmp_path / "weights.safetensors", tmp_path / "notes.txt"
    save_file({"weight": torch.ones(2)}, weights)
    text.write_text("This is a text, and its first eight bytes are no length.")
    for call, name in ((sk.explain, "explain"), (lambda path: sk.load(path, into=Tiny()), "load")):
        with pytest.raises(
            ValueError,
            match=rf"^{name}: .*weights.safetensors: .*expected an object of slimkernels.save",
        ):
            call(weights)
        with pytest.raises(ValueError, match=rf"^{name}: .*notes.txt: header length.*may be no safetensors file"):
            call(text)


def test_saving_masked_models_names_finalize() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sk.prune_(model, 0.5, (16, 1))
    for save in (lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model)):
        with pytest.raises(RuntimeError, match=r"call slimkernels.finalize_\(model\) .* or save model.state_dict\(\)"):
            save()
    assert set(sk.masks(copy.deepcopy(model))) == {"0"}  # copies keep their masks
    torch.save(model.state_dict(), io.BytesIO())
    torch.save(sk.finalize_(model), io.BytesIO())


@needs_native
def test_a_dtype_without_a_sparse_kernel_is_told_at_the_change() -> None:
    fast = sk.convert(sparse_tiny(), policy=FORCE)
    with pytest.warns(UserWarning, match=r"bfloat16 has no sparse kernel on cpu.*back to float32 with model.float"):
        fast.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.float()


def test_cifar_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setitem(sources._NAMED, "cifar10", unreachable)
    with pytest.raises(OSError, match=r"the folder cifar-10-batches-py, got none, and fetching it failed .* digits"):
        sources.open_data(f"cifar10:{tmp_path}", 8, 0)


def test_output_files_are_tried_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "new" / "weights.safetensors"
    assert options.check_writable(out) == out and list(out.parent.iterdir()) == []
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file" / "weights.safetensors"):
        with pytest.raises(OSError, match=f"--out: expected a file that can be written, got {wrong}: "):
            options.check_writable(wrong)


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    options.check_resume(False, checkpoint)
    checkpoint.write_bytes(b"a long run")
    with pytest.raises(ValueError, match=r"--checkpoint: .*run.pt holds a run already.* continue it with --resume, or"):
        options.check_resume(False, checkpoint)
    options.check_resume(True, checkpoint)


def test_convert_tells_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="slimkernels.convert"):
        sk.convert(sparse_tiny(), images(), policy=sk.Policy(repeats=1, budget_s=0, min_speedup=0))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "deciding 5 layers (cpu)" and lines[-1] == "comparing and timing the whole model"
    assert any(line.startswith("features.3 is swapped: ") for line in lines)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="slimkernels.convert"):
        sk.convert(sparse_tiny(), policy=FORCE)
    assert not any("features.3" in record.getMessage() for record in caplog.records)


def test_epochs_are_told_as_they_happen(caplog: pytest.LogCaptureFixture) -> None:
    from slimkernels.compress.training.train import TrainConfig, fine_tune
    from slimkernels.data import TensorLoader

    loader = TensorLoader(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2, batch_size=4)
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.getMessage(), len(told)))  # type: ignore[method-assign]
    log, told = logging.getLogger("slimkernels.train"), []
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        fine_tune(model, loader, loader, TrainConfig(2, 0.01), progress=False)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    lines = [text for text, _ in seen]
    assert len(lines) == 2 and lines[0].startswith("fine_tune: epoch 1 of 2: loss 0.") and ", accuracy " in lines[1]


def test_an_epoch_in_a_line() -> None:
    stats = EpochStats(3, 0.25, 0.1, 0.9, 1.5, 0.92)
    assert epoch_line(stats, 8) == "epoch 3 of 8: loss 0.2500, accuracy 90.00% (average 92.00%) (1.5 s)"
