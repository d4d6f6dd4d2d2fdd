"""Loaders: fixed splits, repeatable epochs, augmentation, and errors that name the file at fault."""

from __future__ import annotations

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from slimkernels import data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded images go to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SLIMKERNELS_CACHE_DIR", str(folder))
    return folder / "data"


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
    torch.testing.assert_close(x, torch.full((2, 1, 4, 4), 2.0), rtol=1e-6, atol=0)


PLAIN = torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "kwargs", "error", "message"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.int64), {}, ValueError, r"\(N, C, H, W\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64), {}, ValueError, r"got .*\(2,\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3), {}, TypeError, "int64 labels"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), {}, ValueError, "at least one image"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), {"batch_size": 0}, ValueError, "batch_size >= 1"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), {"cutout": -1}, ValueError, "cutout >= 0"),
        (*PLAIN, {"padding_mode": "circular"}, ValueError, "padding_mode in zeros, reflect, got 'circular'"),
        (*PLAIN, {"flip": "sometimes"}, ValueError, "flip to be True, False or 'alternating', got 'sometimes'"),
        (*PLAIN, {"crop_padding": 8, "padding_mode": "reflect"}, ValueError, "crop_padding below 8"),
    ],
)
def test_tensor_loader_refuses(images, labels, kwargs, error, message):
    with pytest.raises(error, match=message):
        data.TensorLoader(images, labels, **kwargs)


def epoch_of(loader, number=3):
    loader.set_epoch(number)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_zeroes_one_square_that_the_border_may_cut(side):
    images = torch.ones(1000, 2, 8, 8)
    (x, _) = next(iter(data.TensorLoader(images, torch.zeros(1000).long(), batch_size=1000, cutout=side)))
    assert torch.equal(x[:, 0], x[:, 1])
    holes = x[:, 0] == 0
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == side and heights.min() >= (side + 1) // 2
    assert holes.any(0).all()


def test_crop_flip_and_cutout_compose_on_uint8():
    """Against the same steps one after the other: pad, crop, flip, cut out."""
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    loader = data.TensorLoader(
        images, torch.zeros(64).long(), batch_size=64, seed=2, mean=mean, std=std, crop_padding=2, flip=True, cutout=3
    )
    x, _ = next(iter(loader))
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
    draws = loader._draw(0)
    scaled = (images / 255 - loader.mean) / loader.std
    padded = torch.nn.functional.pad(scaled, (2, 2, 2, 2))
    for i in range(64):
        dy, dx = (int(s) + 2 for s in draws.shifts[:, i, 0])
        expected = padded[i, :, dy : dy + 8, dx : dx + 8]
        if draws.mirrored[i, 0]:
            expected = expected.flip(2)
        cy, cx = (int(c) for c in draws.centres[:, i, 0])
        expected = expected.clone()
        expected[:, max(cy - 1, 0) : cy + 2, max(cx - 1, 0) : cx + 2] = 0
        torch.testing.assert_close(x[i], expected, rtol=1e-5, atol=1e-6)


AUGMENTED = {"shuffle": True, "crop_padding": 2, "flip": True, "cutout": 3, "with_indices": True}
STRONG = {**AUGMENTED, "padding_mode": "reflect", "flip": "alternating"}


def test_reflection_padding_is_that_of_torch():
    images = torch.rand(64, 3, 6, 5)
    loader = data.TensorLoader(images, torch.zeros(64).long(), batch_size=64, crop_padding=4, padding_mode="reflect")
    (x, _) = next(iter(loader))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    windows = padded.unfold(2, 6, 1).unfold(3, 5, 1)  # (64, 3, 9, 9, 6, 5)
    same = (windows == x[:, :, None, None]).flatten(4).all(4).all(1).flatten(1)
    assert same.any(1).all() and same.any(0).sum() > 40


def test_alternating_flips_show_both_sides_in_two_epochs():
    images = torch.arange(400.0).view(100, 1, 2, 2)
    options = {"batch_size": 30, "shuffle": True, "with_indices": True, "flip": "alternating"}
    loader = data.TensorLoader(images, torch.zeros(100).long(), seed=3, **options)

    def mirrored(loader: data.TensorLoader, epoch: int) -> torch.Tensor:
        loader.set_epoch(epoch)
        flips = torch.zeros(100, dtype=torch.bool)
        for x, _, indices in loader:
            straight, turned = (
                (x == images[indices]).flatten(1).all(1),
                (x == images[indices].flip(3)).flatten(1).all(1),
            )
            assert (straight ^ turned).all()
            flips[indices] = turned
        return flips

    first, second, third = (mirrored(loader, epoch) for epoch in range(3))
    assert torch.equal(first, ~second) and torch.equal(first, third) and 30 < first.sum() < 70
    assert not torch.equal(first, mirrored(data.TensorLoader(images, torch.zeros(100).long(), seed=4, **options), 0))


def test_augmented_is_the_loader_with_other_settings():
    images, labels = torch.rand(20, 3, 8, 8), torch.zeros(20).long()
    loader = data.TensorLoader(images, labels, batch_size=6, seed=3, **AUGMENTED)
    strong = loader.augmented(padding_mode="reflect", flip="alternating")
    expected = list(data.TensorLoader(images, labels, batch_size=6, seed=3, **STRONG))
    for got, batch in zip(strong, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, batch, strict=True))
    assert (loader.padding_mode, loader.flip, strong.crop_padding, strong.cutout) == ("zeros", True, 2, 3)
    plain = loader.augmented(crop_padding=0, flip=False, cutout=0)
    assert all(torch.equal(x, images[indices]) for x, _, indices in plain)
    with pytest.raises(ValueError, match="augmented: expected flip to be True, False or 'alternating', got 'both'"):
        loader.augmented(flip="both")


@pytest.mark.parametrize("options", [AUGMENTED, STRONG], ids=["zeros", "reflect"])
def test_strong_augmentation_is_repeatable(options):
    images, labels = torch.rand(20, 3, 8, 8), torch.zeros(20).long()
    one, other = (data.TensorLoader(images, labels, batch_size=6, seed=1, **options) for _ in range(2))
    batches = [x for epoch in range(2) for x, *_ in one]
    other.set_epoch(1)
    assert all(torch.equal(a, b) for a, (b, *_) in zip(batches[4:], other, strict=True))
    assert not torch.equal(batches[0], batches[4])


def test_indices_are_the_samples_places():
    images, labels = ramp(10)
    x, y, indices = epoch_of(data.TensorLoader(images, labels, batch_size=3, shuffle=True, with_indices=True))
    assert torch.equal(x, images[indices]) and torch.equal(y, labels[indices])
    assert indices.dtype == torch.int64 and sorted(indices.tolist()) == list(range(10))


def test_augmentation_does_not_depend_on_the_batch_size():
    """So that accumulated micro-batches are the whole batch."""
    small, large = (epoch_of(data.TensorLoader(*ramp(30), batch_size=b, **AUGMENTED)) for b in (5, 15))
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (15, 4), (7, 3)])
def test_shards_are_slices_of_the_same_batches(batch_size, world):
    def loader():
        return data.TensorLoader(*ramp(40), batch_size=batch_size, **AUGMENTED)

    whole, parts = loader(), [loader().shard(rank, world) for rank in range(world)]
    for _ in range(2):  # epochs count on in shards as well
        for index, batches in enumerate(zip(whole, *parts, strict=True)):
            expected, *slices = batches
            assert len(expected[1]) == whole.batch_samples(index)
            assert max(len(s[1]) for s in slices) - min(len(s[1]) for s in slices) <= 1
            for part, pieces in zip(expected, zip(*slices, strict=True), strict=True):
                assert torch.equal(part, torch.cat(pieces))


def test_a_data_set_kept_on_the_host_gives_the_same_batches(monkeypatch):
    """As one that does not fit the GPU: fetched ahead by a thread. Without a GPU, pinning is left out."""
    expected = epoch_of(data.TensorLoader(*ramp(23), batch_size=5, **AUGMENTED))
    loader = data.TensorLoader(*ramp(23), batch_size=5, **AUGMENTED)
    loader.device = torch.device("cpu", 0)  # not where the images are, as far as the loader can tell
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    assert loader.images.device != loader.device
    assert all(torch.equal(a, b) for a, b in zip(epoch_of(loader), expected, strict=True))


def test_a_device_is_the_same_with_and_without_its_number(monkeypatch):
    """As "cuda" and the "cuda:0" of its tensors: a data set that is where batches are made is not fetched."""
    expected = epoch_of(data.TensorLoader(*ramp(23), batch_size=5, **AUGMENTED))
    numbered = torch.device("cpu", 0)
    assert torch.empty(0, device=numbered).device != numbered
    loader = data.TensorLoader(*ramp(23), batch_size=5, device=numbered, **AUGMENTED)
    monkeypatch.setattr(data.TensorLoader, "_fetch", lambda *args: pytest.fail("fetched from where it is"))
    assert loader.device == loader.images.device == loader.labels.device
    assert all(torch.equal(a, b) for a, b in zip(epoch_of(loader), expected, strict=True))


def test_image_folder(tmp_path):
    train, test = data.image_folder_loaders(write_images(tmp_path), batch_size=4, augment=False)
    assert train.classes == ("cat", "dog") and train.samples == test.samples == 6
    x, y = next(iter(test))
    assert x.shape == (6, 3, 32, 32) and y.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "test/cat/0000.png"))).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.CIFAR10_MEAN, data.CIFAR10_STD))
    torch.testing.assert_close(x[0], (pixels / 255 - mean) / std)
    assert len(train) == 1 and train.crop_padding == 0 and not train.flip


def test_image_folder_takes_val_and_loaders_for_finds_it(tmp_path):
    train, test = data.loaders_for(write_images(tmp_path, splits=("train", "val")), batch_size=2)
    assert train.crop_padding == 4 and train.flip and test.crop_padding == 0 and not test.flip


def test_loaders_for_knows_digits():
    assert data.loaders_for("digits", 32)[0].batch_size == 32


def pixels_of(loader):
    return loader.images.clone(), loader.labels.clone(), loader.classes


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_images_are_decoded_once(tmp_path, own_cache, monkeypatch):
    write_images(tmp_path, count=4)
    first = [pixels_of(part) for part in data.image_folder_loaders(tmp_path)]
    assert len(list(own_cache.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr("slimkernels.data.decoded._pixels", lambda *args: pytest.fail("decoded again"))
        second = [pixels_of(part) for part in data.image_folder_loaders(tmp_path)]
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("change", ["content", "new file", "damaged cache", "truncated cache"])
def test_a_changed_folder_or_damaged_cache_is_decoded_again(tmp_path, own_cache, change):
    write_images(tmp_path)
    before = pixels_of(data.image_folder_loaders(tmp_path)[0])
    file = tmp_path / "train/cat/0001.png"
    if change == "content":
        Image.new("RGB", (32, 32), (1, 2, 3)).save(file)
        os.utime(file, ns=(10**18, 10**18))
    elif change == "new file":
        Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "train/cat/0009.png")
    else:
        (cache,) = own_cache.iterdir()
        cache.write_bytes(b"x" * 100 if change == "damaged cache" else cache.read_bytes()[:1000])
    after = pixels_of(data.image_folder_loaders(tmp_path)[0])
    assert equal(before, after) == ("cache" in change)
    assert equal(after, pixels_of(data.image_folder_loaders(tmp_path, cache=False)[0]))


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, own_cache):
    own_cache.write_bytes(b"a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="could not be cached"):
        train, _ = data.image_folder_loaders(write_images(tmp_path))
    assert train.samples == 6


@pytest.mark.parametrize(("suffix", "mode"), [(".tar.xz", "w:xz"), (".tar", "w")])
@pytest.mark.parametrize("top", ["", "cifar/"])
def test_an_archive_is_read_like_its_folder(tmp_path, suffix, mode, top):
    folder = write_images(tmp_path / "images")
    archive = tmp_path / f"images{suffix}"
    with tarfile.open(archive, mode) as tar:
        for split in ("test", "train"):
            tar.add(folder / split, f"{top}{split}")
    for a, b in zip(data.loaders_for(archive), data.loaders_for(folder), strict=True):
        assert equal(pixels_of(a), pixels_of(b))


def test_bad_archives_are_named(tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "train/dog/0001.png").write_bytes(b"not an image")
    archive = tmp_path / "images.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(folder / "train", "train")
    with pytest.raises(FileNotFoundError, match=r"expected images in test/<class>/ of .*images\.tar\.xz"):
        data.image_folder_loaders(archive)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(folder, "")
    with pytest.raises(ValueError, match=r"unreadable file .*images\.tar\.xz/train/dog/0001\.png"):
        data.image_folder_loaders(archive)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"expected a tar archive, got an unreadable file .*images\.tar\.xz"):
        data.image_folder_loaders(archive)
    with pytest.raises(ValueError, match=r"expected a folder or one of \.tar, .*0000\.png"):
        data.image_folder_loaders(folder / "train/cat/0000.png")


def test_links_of_an_archive_and_a_third_split_are_read_as_in_a_folder(tmp_path):
    folder = write_images(tmp_path / "images", splits=("train", "test", "val"))
    (folder / "train/cat/link.png").symlink_to("0001.png")
    os.link(folder / "train/dog/0000.png", folder / "train/dog/twin.png")
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "top")
    for a, b in zip(data.loaders_for(archive), data.loaders_for(folder), strict=True):
        assert equal(pixels_of(a), pixels_of(b))
    assert data.loaders_for(archive)[0].samples == 8
    with tarfile.open(archive, "a") as tar:
        (folder / "train/cat/lost.png").symlink_to("nowhere.png")
        tar.add(folder / "train/cat/lost.png", "top/train/cat/lost.png")
    with pytest.raises(ValueError, match=r"got top/train/cat/lost\.png in .*images\.tar, which is no file there"):
        data.loaders_for(archive)


def test_names_that_are_no_unicode_and_things_that_are_no_files(tmp_path, own_cache):
    write_images(tmp_path)
    os.rename(tmp_path / "train/cat/0001.png", os.fsencode(tmp_path) + b"/train/cat/\xff.png")
    first, second = (data.image_folder_loaders(tmp_path)[0] for _ in range(2))
    assert first.samples == 6 and equal(pixels_of(first), pixels_of(second))
    os.mkfifo(tmp_path / "train/dog/pipe.png")
    with pytest.raises(ValueError, match=r"got .*dog/pipe\.png, which is no regular file"):
        data.image_folder_loaders(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_are_taken(tmp_path, suffix):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    write_images(tmp_path)
    Image.fromarray(values).save(tmp_path / f"train/cat/0009.{suffix}")
    images = data.image_folder_loaders(tmp_path)[0].images
    assert torch.equal(images[3], torch.from_numpy(values // 256).to(torch.uint8).expand(3, 32, 32))


def test_images_of_unknown_range_and_sizes_below_1_are_refused(tmp_path):
    write_images(tmp_path)
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "train/cat/0009.tif")
    with pytest.raises(ValueError, match=r"0009\.tif \(values of 32 bits \(mode F\), whose range is not known"):
        data.image_folder_loaders(tmp_path)
    with pytest.raises(ValueError, match="expected size >= 1 or None, got 0"):
        data.image_folder_loaders(tmp_path, size=0)


def test_size_scales_and_crops_the_centre(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (60, 40), (9, 8, 7)).save(tmp_path / "train/cat/0001.png")
    train, test = data.image_folder_loaders(tmp_path, size=16)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 16, 16) and train.crop_padding == 2
    assert train.images[1].flatten(1).T.unique(dim=0).tolist() == [[9, 8, 7]]


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
    with pytest.raises(ValueError, match=r"expected images of 32x32 pixels.*got 16x20 in .*cat/0001\.png"):
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


def write_cifar(tmp_path, monkeypatch, base_folder, batches, meta, label_key):
    folder = tmp_path / base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in batches:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), label_key: [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"class{i}" for i in range(10)]
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args, **kwargs: True)
    return torch.from_numpy(pickle.loads((folder / batches[-1]).read_bytes())["data"].reshape(20, 3, 32, 32))


def test_cifar10_pickles(tmp_path, monkeypatch):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    stored = write_cifar(tmp_path, monkeypatch, "cifar-10-batches-py", names, ("batches.meta", "label_names"), "labels")
    train, test = data.loaders_for(tmp_path, batch_size=10, cutout=8, with_indices=True)
    assert (train.samples, test.samples, train.classes[3], train.cutout) == (100, 20, "class3", 8)
    assert train.with_indices and not test.with_indices and test.cutout == 0
    assert torch.equal(test.images, stored)
    torch.testing.assert_close(test.mean.flatten(), torch.tensor(data.CIFAR10_MEAN))


def test_cifar100_pickles(tmp_path, monkeypatch):
    stored = write_cifar(
        tmp_path, monkeypatch, "cifar-100-python", ["train", "test"], ("meta", "fine_label_names"), "fine_labels"
    )
    train, test = data.loaders_for(tmp_path, batch_size=10)
    assert (train.samples, test.samples, train.classes[3]) == (20, 20, "class3")
    assert torch.equal(test.images, stored)
    torch.testing.assert_close(test.mean.flatten(), torch.tensor(data.CIFAR100_MEAN))


def test_cifar_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar10_loaders: .*cifar-10-batches-py"):
        data.cifar10_loaders(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar100_loaders: .*cifar-100-python"):
        data.loaders_for("cifar100")
