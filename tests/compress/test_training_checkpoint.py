"""Training checkpoints: every damaged file is refused by name, an older one is kept, a kill at any step leaves one."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimkernels import files, fine_tune
from slimkernels.compress.training import checkpoint as training_checkpoint
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.checkpoint import previous_checkpoint, read_checkpoint, remove_checkpoint
from slimkernels.data import TensorLoader


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def loader() -> TensorLoader:
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(24, 1, 4, 4, generator=generator), torch.arange(24) % 3
    return TensorLoader(images, labels, batch_size=8, seed=0, shuffle=True)


class Stop(Callback):
    """Ends the run when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.step = 3 * epoch

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def train(path: Path, model: nn.Module, stop: int = 99, **options: Any) -> nn.Module:
    fine_tune(model, loader(), epochs=4, progress=False, checkpoint=path, callbacks=[Stop(stop)], **options)
    return model


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The checkpoint of epoch 3 of 4; that of epoch 2 beside it."""
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(path, net(), stop=3)
    return path


def epochs(path: Path) -> int:
    return len(read_checkpoint("test", path)["history"])


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_flipped_bits_are_never_resumed(interrupted: Path) -> None:
    rng = random.Random(0)
    for path in (interrupted, previous_checkpoint(interrupted)):
        data = path.read_bytes()
        positions = {0, len(data) - 1, len(data) - 64, len(data) - 65, len(data) - 85, len(data) - 105}
        for position in sorted(positions | {rng.randrange(len(data)) for _ in range(200)}):
            broken = bytearray(data)
            broken[position] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=rf"^test: expected a training checkpoint in {path}, but it"):
                read_checkpoint("test", path)
        path.write_bytes(data)
    assert (epochs(interrupted), epochs(previous_checkpoint(interrupted))) == (3, 2)


def test_files_cut_short_or_grown_are_refused(interrupted: Path) -> None:
    data = interrupted.read_bytes()
    for changed in (b"", data[:10], data[:-1], data[: len(data) // 2], data + b"\0", b"\0" + data):
        interrupted.write_bytes(changed)
        with pytest.raises(ValueError, match=r"expected a training checkpoint in .*run\.pt, but it"):
            read_checkpoint("test", interrupted)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_resumes_to_the_same_weights(interrupted: Path) -> None:
    whole = train(interrupted.with_name("whole.pt"), net())
    data = bytearray(interrupted.read_bytes())
    data[len(data) // 2] ^= 4
    interrupted.write_bytes(data)
    model = net(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        r"^fine_tune: .*run\.pt, but its bytes have .*run\.previous\.pt, is whole \(epoch 2\): rename it to run\.pt"
    )
    with pytest.raises(ValueError, match=message):
        train(interrupted, model, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    previous = previous_checkpoint(interrupted)
    previous.replace(interrupted)
    assert same(train(interrupted, model, resume=True), whole)


def test_the_message_says_when_no_older_one_is_whole(interrupted: Path) -> None:
    for path in (interrupted, previous_checkpoint(interrupted)):
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"the one before it, .*run\.previous\.pt, is damaged too"):
        read_checkpoint("test", interrupted)
    previous_checkpoint(interrupted).unlink()
    with pytest.raises(ValueError, match="there is no earlier one"):
        read_checkpoint("test", interrupted)


def test_the_last_two_are_kept_and_removed_together(interrupted: Path) -> None:
    assert sorted(os.listdir(interrupted.parent)) == ["run.previous.pt", "run.pt"]
    train(interrupted, net(), resume=True)
    assert (epochs(interrupted), epochs(previous_checkpoint(interrupted))) == (4, 3)
    remove_checkpoint(interrupted)
    remove_checkpoint(interrupted)
    assert os.listdir(interrupted.parent) == []


STEPS = [(os, "link"), (os, "replace"), (os, "fsync"), (os, "chmod"), (training_checkpoint, "seal")]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("after", [False, True])
def test_stopped_between_any_two_steps_a_checkpoint_is_left(
    owner: Any, name: str, after: bool, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before or after each call that touches the files, at its first, second, ... time."""
    original, folder, saved = getattr(owner, name), interrupted.parent, interrupted.with_name("saved")
    saved.mkdir()
    for file in ("run.pt", "run.previous.pt"):
        shutil.copy(folder / file, saved / file)

    @contextmanager
    def ended(limit: int) -> Iterator[None]:
        calls = [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == limit and not after:
                raise KeyboardInterrupt
            found = original(*args, **kwargs)
            if calls[0] == limit:
                raise KeyboardInterrupt
            return found

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            yield

    stopped = 0
    for limit in range(1, 6):
        remove_checkpoint(interrupted)
        for file in ("run.pt", "run.previous.pt"):
            shutil.copy(saved / file, folder / file)
        try:
            with ended(limit):
                train(interrupted, net(seed=1), resume=True)
        except KeyboardInterrupt:
            stopped += 1
        assert epochs(interrupted) in (3, 4)
        assert epochs(previous_checkpoint(interrupted)) in (2, 3)
    assert stopped >= 1


def test_without_hard_links_the_one_before_is_a_copy(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    train(interrupted, net(), resume=True)
    assert (epochs(interrupted), epochs(previous_checkpoint(interrupted))) == (4, 3)


def test_a_sealed_file_is_still_a_zip_archive_that_torch_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(3)}, path)
    assert "does not end with its SHA-256" in (files.seal_obstacle(path) or "")
    files.seal(path)
    assert files.seal_obstacle(path) is None
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(3))
    assert zipfile.ZipFile(path).testzip() is None
    with pytest.raises(ValueError, match=r"^seal: expected a zip archive without a comment"):
        files.seal(path)
    (tmp_path / "b").write_bytes(b"no archive at all, but long enough to have an end")
    with pytest.raises(ValueError, match=r"^seal: expected a zip archive"):
        files.seal(tmp_path / "b")


def test_nothing_but_tensors_and_numbers_is_unpickled(tmp_path: Path) -> None:
    """A hash is no signature: what somebody sealed is still read without running code."""
    path, ran = tmp_path / "run.pt", tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(ran),)

    torch.save({"format": 3, "code": Code()}, path)
    files.seal(path)
    with pytest.raises(ValueError, match="unreadable file"):
        read_checkpoint("test", path)
    assert not ran.exists()
