"""Data sets: the on-disk formats on small made-up files, the split among processes, and repeatable batches."""

import hashlib
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from sdgp_accel.training import Augment, Resolution, augment, load_recipe
from sdgp_accel.training.data import epoch_order, load_data
from sdgp_accel.training.distributed import World
from sdgp_accel.training.loop import global_state

ALONE = World(0, 1, torch.device("cpu"))


def batches_equal(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(left, right, strict=True)
    )


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A CIFAR-10 of 5 x 20 training and 30 test images in the original's files; pixel = class, plane = colour."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def part(name, count):
        labels = [i % 10 for i in range(count)]
        pixels = np.repeat(np.array(labels, np.uint8)[:, None] * 10, 3072, 1)
        pixels[:, 1024:2048] += 100  # the planes are stored one after the other: red, green, blue
        pixels[:, 0] = 255
        return [name, write(name, {"data": pixels, "labels": labels})]

    monkeypatch.setattr(CIFAR10, "train_list", [part(f"data_batch_{i}", 20) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [part("test_batch", 30)])
    names = {"label_names": [str(i) for i in range(10)]}
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", names)}
    )
    return tmp_path


@pytest.fixture
def image_folder(tmp_path):
    """40 training and 12 test images of two classes in assorted sizes; class 1 is the brighter one."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 12)):
        for i in range(count):
            folder = tmp_path / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(40, 90, 2)
            pixels = rng.integers(0, 100, (height, width, 3)) + 150 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def folder_recipe(**changes):
    base = load_recipe("imagenet/resnet18-dense")
    small = Resolution(start=32, end=64, ramp_start=1, ramp_end=3, test=64)
    return replace(base, batch_size=8, resolution=small, workers=0, **changes)


def test_digits():
    data = load_data(replace(load_recipe("digits"), augment=Augment()), None, ALONE)
    (images, labels), *_ = data.train(0)
    assert images.shape == (64, 1, 8, 8)
    assert (images.dtype, labels.dtype, data.num_classes) == (torch.float32, torch.int64, 10)
    everything = torch.cat([images for images, _ in data.train(0)])
    assert abs(everything.mean()) < 0.02
    assert abs(everything.std() - 1) < 0.02
    tested = torch.cat([labels for _, labels in data.test()])
    assert len(tested) == 359
    assert tested.bincount().min() > 20


def test_cifar10_reads_the_original_files(cifar10):
    recipe = replace(load_recipe("cifar10/dense"), augment=Augment(), batch_size=25)
    data = load_data(recipe, cifar10, ALONE)
    assert (data.steps_per_epoch, data.num_classes) == (4, 10)
    seen = []
    for images, labels in data.train(0):
        assert images.shape == (25, 3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        expected = (labels * 10 / 255 - 0.4914) / 0.2023, ((labels * 10 + 100) / 255 - 0.4822) / 0.1994
        torch.testing.assert_close(images[:, 0, 5, 7], expected[0])
        torch.testing.assert_close(images[:, 1, 5, 7], expected[1])
        torch.testing.assert_close(images[:, 2, 5, 7], (labels * 10 / 255 - 0.4465) / 0.2010)
        seen += labels.tolist()
    assert sorted(seen) == sorted(list(range(10)) * 10)
    assert [len(labels) for _, labels in data.test()] == [30]


def test_cifar10_augments_and_repeats(cifar10):
    data = load_data(replace(load_recipe("cifar10/dense"), batch_size=25), cifar10, ALONE)
    images = next(data.train(3))[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images[:, 0] == 0).sum() >= 25 * 16  # each has its 4x4 hole, and most a border
    assert batches_equal(data.train(3), data.train(3))
    assert batches_equal(data.train(3, first_step=2), list(data.train(3))[2:])
    assert not batches_equal(data.train(3), data.train(4))


def test_no_two_streams_of_a_run_are_the_same(cifar10, monkeypatch):
    """Those of the runs, processes, epochs and steps, and of the order of the images and their augmentation."""
    seeds, recipe, permute = [], replace(load_recipe("cifar10/dense"), batch_size=10), torch.randperm
    monkeypatch.setattr(augment, "random_flip", lambda images, rng: seeds.append(rng.initial_seed()) or images)
    for seed, rank in itertools.product(range(2), range(2)):
        recipe = replace(recipe, seed=seed)
        data = load_data(recipe, cifar10, World(rank, 2, torch.device("cpu")))
        for epoch in range(2):
            assert len(list(data.train(epoch))) == data.steps_per_epoch == 5
        with global_state(recipe, rank):
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == len(seeds) == 44
    monkeypatch.setattr(torch, "randperm", lambda n, generator: seeds.append(generator.initial_seed()) or permute(n))
    for seed, epoch in itertools.product(range(2), range(2)):  # of all processes
        epoch_order(replace(recipe, seed=seed), ALONE, epoch, 100)
    assert len(set(seeds)) == len(seeds) == 48


def test_images_are_augmented_as_far_as_the_recipe_says(cifar10, monkeypatch):
    done, recipe = [], replace(load_recipe("cifar10/dense"), batch_size=50, channels_last=False)
    for name in ("random_flip", "pad_crop", "cutout"):
        monkeypatch.setattr(augment, name, lambda images, *rest, name=name: done.append((name, *rest[:-1])) or images)
    for wanted in (Augment(), Augment(flip=True), Augment(pad_crop=3, cutout=5)):
        images, _ = next(load_data(replace(recipe, augment=wanted), cifar10, ALONE).train(0))
        assert images.is_contiguous()
    assert done == [("random_flip",), ("pad_crop", 3), ("cutout", 5)]


def test_cifar10_missing_or_damaged(tmp_path, cifar10):
    with pytest.raises(ValueError, match="data_dir must name the folder"):
        load_data(load_recipe("cifar10/dense"), None, ALONE)
    with pytest.raises(FileNotFoundError, match="must hold the folder cifar-10-batches-py"):
        load_data(load_recipe("cifar10/dense"), tmp_path / "nowhere", ALONE)
    with pytest.raises(ValueError, match="got 512 x 1 processes for 100 training images"):
        load_data(load_recipe("cifar10/dense"), cifar10, ALONE)
    (cifar10 / CIFAR10.base_folder / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"CIFAR-10's own files; some in .*cifar-10-batches-py are missing or"):
        load_data(load_recipe("cifar10/dense"), cifar10, ALONE)


def test_image_folder(image_folder):
    data = load_data(folder_recipe(), image_folder, ALONE)
    assert (data.num_classes, data.steps_per_epoch) == (2, 5)
    for epoch, side in ((0, 32), (3, 64)):
        batches = list(data.train(epoch))
        assert [images.shape for images, _ in batches] == [(8, 3, side, side)] * 5
        for images, labels in batches:
            assert torch.equal(images.mean((1, 2, 3)) > 0.5, labels.bool())
    tested = list(data.test())
    assert [images.shape for images, _ in tested] == [(12, 3, 64, 64)]


def picture_folder(folder, pixels, train=8, val=1, names=("one",)):
    """Image folders of copies of one picture."""
    for split, count in (("train", train), ("val", val)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def test_image_folder_normalises_the_middle_of_each_picture(tmp_path):
    pixels = np.full((73, 73, 3), 255)
    pixels[4:-4, 4:-4] = (124, 116, 104)  # ImageNet's mean; around it the 73 - 64 = 9 pixels that the test crop leaves
    ((images, _),) = load_data(folder_recipe(), picture_folder(tmp_path / "mean", pixels), ALONE).test()
    assert images.abs().max() < 0.01
    pixels[:] = 255
    data = load_data(folder_recipe(), picture_folder(tmp_path / "white", pixels), ALONE)
    white = torch.tensor([2.2489, 2.4286, 2.6400])  # (1 - mean) / std
    for images, _ in (*data.test(), *data.train(0)):
        torch.testing.assert_close(images, white[:, None, None].expand_as(images), atol=1e-4, rtol=0)


def test_image_folder_mirrors_where_the_recipe_says_so(tmp_path):
    ramp = picture_folder(tmp_path, np.broadcast_to(np.arange(0, 256, 4)[:, None], (64, 64, 3)), train=40)
    for flip in (False, True):
        recipe = folder_recipe(augment=Augment(flip=flip))
        images = torch.cat([images for images, _ in load_data(recipe, ramp, ALONE).train(0)])
        mirrored = images[..., 0].mean((1, 2)) > images[..., -1].mean((1, 2))
        assert 8 < mirrored.sum() < 32 if flip else not mirrored.any()


def test_image_folder_is_shared_by_processes_and_depends_on_the_seed(image_folder):
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    shares = [[image.numpy().tobytes() for images, _ in load_data(folder_recipe(), image_folder, world).test()
               for image in images] for world in worlds]  # fmt: skip
    assert [len(share) for share in shares] == [6, 6]
    assert set(shares[0]).isdisjoint(shares[1])
    crops = [{image.numpy().tobytes() for images, _ in load_data(folder_recipe(seed=seed), image_folder, ALONE).train(1)
              for image in images} for seed in range(2)]  # fmt: skip
    assert crops[0].isdisjoint(crops[1])


def test_image_folder_with_other_classes_to_test_on(tmp_path):
    folder = picture_folder(tmp_path, np.zeros((40, 40, 3)), names=("one", "two"))
    (folder / "val" / "two").rename(folder / "val" / "three")
    with pytest.raises(ValueError, match=r"train and val of .* must hold the same classes"):
        load_data(folder_recipe(), folder, ALONE)


def test_image_folder_does_not_depend_on_workers_or_global_state(image_folder):
    alone, workers = folder_recipe(), folder_recipe()
    workers = replace(workers, workers=2)
    expected = list(load_data(alone, image_folder, ALONE).train(1))
    crops = [
        {image.numpy().tobytes() for images, _ in batches for image in images}
        for batches in (expected, load_data(alone, image_folder, ALONE).train(0))
    ]
    assert crops[0].isdisjoint(crops[1])  # other crops of the same images in the next epoch
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert batches_equal(load_data(workers, image_folder, ALONE).train(1), expected)
    assert batches_equal(load_data(alone, image_folder, ALONE).train(1, first_step=3), expected[3:])
    assert torch.equal(torch.get_rng_state(), before)  # the stream that pruning draws from stays where it was


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    rng = np.random.default_rng(0)
    folder = picture_folder(tmp_path, rng.integers(0, 256, (64, 64, 3)))
    damaged = folder / "train" / "one" / "5.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    data = load_data(replace(folder_recipe(), workers=workers), folder, ALONE)
    with pytest.raises(OSError, match=r"one/5\.png cannot be read as an image: image file is truncated"):
        list(data.train(0))


def test_image_folder_missing(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="val is missing"):
        load_data(folder_recipe(), tmp_path, ALONE)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_data(world_size):
    recipe = load_recipe("digits", {"batch_size": 10})
    worlds = [World(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    orders = torch.stack([epoch_order(recipe, world, 2, 107) for world in worlds])
    assert orders.shape == (world_size, 107 // (10 * world_size), 10)
    assert len(orders.unique()) == orders.numel()  # no image twice
    if world_size > 1:
        tests = [load_data(recipe, None, world).test() for world in worlds]
        assert sum(len(labels) for share in tests for _, labels in share) == 359


def test_order_changes_with_seed_and_epoch():
    recipe = load_recipe("digits")
    first = epoch_order(recipe, ALONE, 0, 1000)
    assert torch.equal(first, epoch_order(recipe, ALONE, 0, 1000))
    assert not torch.equal(first, epoch_order(recipe, ALONE, 1, 1000))
    assert not torch.equal(first, epoch_order(replace(recipe, seed=1), ALONE, 0, 1000))
