"""Loaders: fixed splits, repeatable epochs, augmentation, and errors that name the file at fault."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from slimkernels import data


def ramp(n: int = 10, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(n * 3 * size * size, dtype=torch.float32).reshape(n, 3, size, size)
    return images, torch.arange(n) % 3


def write_images(root, splits=("train", "test"), classes=("cat", "dog"), count=3, size=(32, 32)):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (*size, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def test_digits_split_is_fixed_and_normalised():
    train, test = data.digits_loaders(batch_size=64, seed=0)
    other, _ = data.digits_loaders(batch_size=64, seed=1)
    assert (train.samples, test.samples) == (1347, 450)
    assert torch.equal(train.images, other.images)
    x, y = next(iter(train))
    assert x.shape == (64, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert not torch.equal(y, next(iter(other))[1])
    everything = torch.cat([x for x, _ in train])
    assert abs(everything.mean()) < 0.02 and abs(everything.std() - 1) < 0.02
    assert len(list(test)) == len(test) == 2
    counts = torch.bincount(test.labels)
    assert counts.min() >= 43 and counts.max() <= 47


def test_no_digit_is_in_both_halves():
    train, test = data.digits_loaders()
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_epochs_are_repeatable_and_differ():
    images, labels = ramp(32)

    def epoch(loader, number):
        loader.set_epoch(number)
        return torch.cat([x for x, _ in loader])

    kwargs = {"batch_size": 5, "shuffle": True, "seed": 3, "crop_padding": 2, "flip": True}
    first, second = data.TensorLoader(images, labels, **kwargs), data.TensorLoader(images, labels, **kwargs)
    assert torch.equal(epoch(first, 4), epoch(second, 4))
    assert not torch.equal(epoch(first, 4), epoch(first, 5))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(first)
    assert torch.equal(torch.get_rng_state(), before)


def test_iterating_again_is_the_next_epoch():
    loader = data.TensorLoader(*ramp(32), batch_size=32, shuffle=True)
    (x0, _), (x1, _) = next(iter(loader)), next(iter(loader))
    assert not torch.equal(x0, x1)
    assert torch.equal(x0.sort(0).values, x1.sort(0).values)


@pytest.mark.parametrize(("drop_last", "batches"), [(False, 4), (True, 3)])
def test_length_matches_iteration(drop_last, batches):
    loader = data.TensorLoader(*ramp(10), batch_size=3, drop_last=drop_last)
    assert len(loader) == len(list(loader)) == batches


def test_drop_last_keeps_an_only_batch():
    assert len(list(data.TensorLoader(*ramp(2), batch_size=3, drop_last=True))) == 1


def test_crop_is_a_shifted_window():
    images, labels = ramp(64)
    loader = data.TensorLoader(images + 1, labels, batch_size=64, crop_padding=2)
    (x, _), padded = next(iter(loader)), torch.nn.functional.pad(images + 1, (2, 2, 2, 2))
    shifts = set()
    for i in range(64):
        matches = [
            (dy, dx) for dy in range(5) for dx in range(5) if torch.equal(x[i], padded[i, :, dy : dy + 8, dx : dx + 8])
        ]
        assert len(matches) == 1
        shifts.update(matches)
    assert len(shifts) > 15


def test_flip_mirrors_about_half():
    images, labels = ramp(200)
    x, _ = next(iter(data.TensorLoader(images, labels, batch_size=200, flip=True)))
    kept = sum(bool(torch.equal(a, b)) for a, b in zip(x, images, strict=True))
    mirrored = sum(bool(torch.equal(a, b.flip(2))) for a, b in zip(x, images, strict=True))
    assert kept + mirrored == 200 and 70 < kept < 130


def test_uint8_is_scaled_and_normalised():
    images = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    x, _ = next(iter(data.TensorLoader(images, torch.zeros(2, dtype=torch.int64), mean=(0.5,), std=(0.25,))))
    assert torch.equal(x, torch.full((2, 1, 4, 4), 2.0))


@pytest.mark.parametrize(
    ("images", "labels", "kwargs", "error", "message"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.int64), {}, ValueError, r"\(N, C, H, W\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64), {}, ValueError, r"got .*\(2,\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3), {}, TypeError, "int64 labels"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), {}, ValueError, "at least one image"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), {"batch_size": 0}, ValueError, "batch_size >= 1"),
    ],
)
def test_tensor_loader_refuses(images, labels, kwargs, error, message):
    with pytest.raises(error, match=message):
        data.TensorLoader(images, labels, **kwargs)


def test_image_folder(tmp_path):
    train, test = data.image_folder_loaders(write_images(tmp_path), batch_size=4, augment=False)
    assert train.classes == ("cat", "dog") and train.samples == test.samples == 6
    x, y = next(iter(test))
    assert x.shape == (6, 3, 32, 32) and y.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "test/cat/0000.png"))).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.CIFAR10_MEAN, data.CIFAR10_STD))
    torch.testing.assert_close(x[0], (pixels / 255 - mean) / std)
    assert len(train) == 1 and train.crop_padding == 0 and not train.flip


def test_image_folder_takes_val_and_loaders_finds_it(tmp_path):
    train, test = data.loaders(write_images(tmp_path, splits=("train", "val")), batch_size=2)
    assert train.crop_padding == 4 and train.flip and test.crop_padding == 0 and not test.flip


def test_loaders_knows_digits():
    assert data.loaders("digits", 32)[0].batch_size == 32


def test_unreadable_image_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train/dog/0001.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"unreadable file .*dog/0001\.png"):
        data.image_folder_loaders(tmp_path)


def test_truncated_image_is_named(tmp_path):
    write_images(tmp_path)
    file = tmp_path / "test/cat/0002.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"unreadable file .*cat/0002\.png"):
        data.image_folder_loaders(tmp_path)


def test_image_of_another_size_is_named(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (16, 20)).save(tmp_path / "train/cat/0001.png")
    with pytest.raises(ValueError, match=r"expected images of 32x32 pixels, got 16x20 in .*cat/0001\.png"):
        data.image_folder_loaders(tmp_path)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.image_folder_loaders(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="found no 'val'"):
        data.image_folder_loaders(tmp_path)


def test_classes_must_agree(tmp_path):
    write_images(tmp_path, splits=("train",))
    write_images(tmp_path, splits=("test",), classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"same classes.*\['cow', 'dog'\]"):
        data.image_folder_loaders(tmp_path)


def test_cifar10_pickles(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args, **kwargs: True)
    train, test = data.loaders(tmp_path, batch_size=10)
    assert (train.samples, test.samples, train.classes[3]) == (100, 20, "class3")
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(20, 3, 32, 32)
    assert torch.equal(test.images, torch.from_numpy(stored))


def test_cifar10_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        data.cifar10_loaders(tmp_path)
