"""The data sets as the training loop sees them: batches of normalised images and labels on the device.

Everything random about a batch is a pure function of (seed, epoch, step, rank), and for image folders of the
image's index too. So a run that resumes in the middle of an epoch sees the images that it would have seen,
augmented alike, and no data-loading state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdgp_accel.training import augment
from sdgp_accel.training.distributed import World
from sdgp_accel.training.recipe import Recipe
from sdgp_accel.training.schedule import image_size

Batch = tuple[Tensor, Tensor]  # images [N, C, H, W] in float32, labels [N] in int64
TEST_BATCH = 512


class Colours(NamedTuple):
    """Mean and standard deviation of each channel of a data set, as fractions of its largest pixel value."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    largest: int = 255


DIGITS_COLOURS = Colours((0.3053,), (0.3760,), largest=16)
CIFAR10_COLOURS = Colours((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_COLOURS = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Data(Protocol):
    """A data set, this process's share of it."""

    num_classes: int
    steps_per_epoch: int

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The training batches of `epoch` from `first_step` on."""

    def test(self) -> Iterator[Batch]:
        """The test set; the processes' shares are disjoint and complete."""


def load_data(recipe: Recipe, data_dir: Path | None, world: World) -> Data:
    """The data set `recipe` names; those on disk are read from `data_dir`.

    Raises ValueError where `data_dir` is needed and missing or the training set has less than one batch,
    FileNotFoundError where the files are not there.
    """
    if recipe.data == "digits":
        return InMemory(recipe, world, *_digits(), DIGITS_COLOURS)
    if data_dir is None:
        raise ValueError(f"data_dir must name the folder that holds the data set; data = {recipe.data!r} is on disk")
    if recipe.data == "cifar10":
        return InMemory(recipe, world, *_cifar10(data_dir), CIFAR10_COLOURS)
    return ImageFolders(recipe, world, data_dir)


def generator_for(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a pure function of `purpose` and `numbers`, unrelated for different ones."""
    return torch.Generator().manual_seed(_mix(purpose, *numbers))


def epoch_order(recipe: Recipe, world: World, epoch: int, size: int) -> Tensor:
    """The indices of this process's batches in `epoch`: int64 [steps, batch_size] out of `size` images."""
    steps = _steps_per_epoch(recipe, world, size)
    order = torch.randperm(size, generator=generator_for("order", recipe.seed, epoch))
    return order[: steps * world.size * recipe.batch_size].view(steps, world.size, -1)[:, world.rank]


class Normalise:
    """Turns uint8 images [N, C, H, W] into float32 ones with mean 0 and variance 1, on `device`."""

    def __init__(self, recipe: Recipe, device: torch.device, colours: Colours) -> None:
        self.mean = colours.largest * torch.tensor(colours.mean, device=device)[:, None, None]
        self.std = colours.largest * torch.tensor(colours.std, device=device)[:, None, None]
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=self.format)


class InMemory:
    """A small data set, whole on the device as uint8, augmented there a batch at a time."""

    def __init__(self, recipe: Recipe, world: World, train: Batch, test: Batch, colours: Colours) -> None:
        self.recipe, self.world = recipe, world
        self.num_classes = int(train[1].max()) + 1
        self.steps_per_epoch = _steps_per_epoch(recipe, world, len(train[1]))
        self.normalise = Normalise(recipe, world.device, colours)
        self.train_images, self.train_labels = (part.to(world.device) for part in train)
        self.test_images, self.test_labels = (part[world.rank :: world.size].to(world.device) for part in test)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = epoch_order(self.recipe, self.world, epoch, len(self.train_labels)).to(self.world.device)
        for step in range(first_step, len(order)):
            rng = generator_for("augment", self.recipe.seed, epoch, step, self.world.rank)
            yield self._augmented(self.train_images[order[step]], rng), self.train_labels[order[step]]

    def test(self) -> Iterator[Batch]:
        for start in range(0, len(self.test_labels), TEST_BATCH):
            part = slice(start, start + TEST_BATCH)
            yield self.normalise(self.test_images[part]), self.test_labels[part]

    def _augmented(self, images: Tensor, rng: torch.Generator) -> Tensor:
        wanted, images = self.recipe.augment, self.normalise(images)
        if wanted.flip:
            images = augment.random_flip(images, rng)
        if wanted.pad_crop:
            images = augment.pad_crop(images, wanted.pad_crop, rng)
        if wanted.cutout:
            images = augment.cutout(images, wanted.cutout, rng)
        return images.contiguous(memory_format=self.normalise.format)


class ImageFolders:
    """``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, decoded and cropped by worker processes."""

    def __init__(self, recipe: Recipe, world: World, data_dir: Path) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        for folder in (data_dir / "train", data_dir / "val"):
            if not folder.is_dir():
                raise FileNotFoundError(f"data_dir must hold the folders train and val; {folder} is missing")
        assert recipe.resolution is not None
        self.recipe, self.world, self.resolution = recipe, world, recipe.resolution
        side = recipe.resolution.test
        # The test crop is the middle 224/256 of the image, the usual share.
        whole = [v2.Resize(round(side * 256 / 224), antialias=True), v2.CenterCrop(side), v2.PILToTensor()]
        self.train_images = ImageFolder(str(data_dir / "train"), loader=_read_image)
        self.test_images = ImageFolder(str(data_dir / "val"), transform=v2.Compose(whole), loader=_read_image)
        if self.train_images.classes != self.test_images.classes:
            raise ValueError(f"the folders train and val of {data_dir} must hold the same classes")
        self.num_classes = len(self.train_images.classes)
        self.steps_per_epoch = _steps_per_epoch(recipe, world, len(self.train_images))
        self.normalise = Normalise(recipe, world.device, IMAGENET_COLOURS)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(image_size(self.resolution, epoch), antialias=True)]
        steps += [v2.RandomHorizontalFlip()] if self.recipe.augment.flip else []
        images = _Seeded(self.train_images, v2.Compose([*steps, v2.PILToTensor()]), (self.recipe.seed, epoch))
        order = epoch_order(self.recipe, self.world, epoch, len(self.train_images))
        return self._load(images, order[first_step:].tolist())

    def test(self) -> Iterator[Batch]:
        mine = range(self.world.rank, len(self.test_images), self.world.size)
        return self._load(self.test_images, [list(mine[i : i + TEST_BATCH]) for i in range(0, len(mine), TEST_BATCH)])

    def _load(self, images: Dataset[Any], batches: list[list[int]]) -> Iterator[Batch]:
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.recipe.workers,
            pin_memory=self.world.device.type == "cuda",
            # Its own generator: a loader seeds its workers from the global one otherwise, which would move
            # the stream that the pruning draws from.
            generator=torch.Generator(),
        )
        for inputs, labels in loader:
            device = self.world.device
            yield self.normalise(inputs.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Applies `transform` to image `i` under a global generator seeded from `seed` and `i`, whatever process asks."""

    def __init__(
        self, images: Dataset[tuple[object, int]], transform: Callable[[object], Tensor], seed: tuple[int, ...]
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        # The default CPU generator alone: torch.manual_seed would seed the GPUs' too.
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mix("augment", *self.seed, index))
        try:
            return self.transform(image), label
        finally:
            torch.default_generator.set_state(state)


def _read_image(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # Pillow's, which seldom say of which file
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def _mix(*parts: str | int) -> int:
    # Not numpy's SeedSequence, to which (1, 2) and (1, 2, 0) are the same.
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _steps_per_epoch(recipe: Recipe, world: World, size: int) -> int:
    steps = size // (recipe.batch_size * world.size)
    if steps == 0:
        raise ValueError(
            f"batch_size must leave a whole batch for each process; got {recipe.batch_size} x {world.size} processes "
            f"for {size} training images"
        )
    return steps


def _digits() -> tuple[Batch, Batch]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data come with scikit-learn: pip install 'sdgp_accel[vision]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    held_out = torch.arange(len(images)) % 5 == 4
    targets = torch.from_numpy(labels).long()
    return (images[~held_out], targets[~held_out]), (images[held_out], targets[held_out])


def _cifar10(data_dir: Path) -> tuple[Batch, Batch]:
    from torchvision.datasets import CIFAR10

    if not (data_dir / CIFAR10.base_folder).is_dir():
        raise FileNotFoundError(
            f"data_dir must hold the folder {CIFAR10.base_folder}; {data_dir} does not. To fetch it: "
            f"python -c \"import torchvision; torchvision.datasets.CIFAR10('{data_dir}', download=True)\""
        )
    try:
        parts = [CIFAR10(str(data_dir), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"data_dir must hold CIFAR-10's own files; some in {data_dir / CIFAR10.base_folder} are missing or have "
            "another MD5 sum"
        ) from error
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts)
    return train, test
