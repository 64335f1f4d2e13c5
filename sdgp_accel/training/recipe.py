"""A recipe: everything that decides what a training run computes, read from YAML and checked.

A recipe file is a mapping of `Recipe`'s fields. ``extends: NAME`` starts from another recipe, whose mappings
are merged key by key and whose other values are replaced; NAME is a built-in recipe or a path relative to
the file that names it. Built-in names are paths under ``sdgp_accel/recipes``; those whose file name starts with an
underscore are only there to be extended.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sdgp_accel.config import SDGPConfig
from sdgp_accel.schedule import Schedule

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DEFAULT_RECIPE = "digits"


@dataclass(frozen=True)
class Augment:
    """Training augmentation: random mirroring, then a translation by up to `pad_crop` pixels, then a hole of side
    `cutout`. Image folders take random resized crops instead of the last two."""

    flip: bool = False
    pad_crop: int = 0
    cutout: int = 0


@dataclass(frozen=True)
class Resolution:
    """Sides of an image folder's images: training goes from `start` to `end` between two epochs."""

    start: int
    end: int
    ramp_start: int
    ramp_end: int
    test: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "test"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise ValueError(f"resolution.{name} must be a positive multiple of 32; got {getattr(self, name)}")
        if self.ramp_start >= self.ramp_end:
            raise ValueError(f"resolution.ramp_start must be below ramp_end; got {self.ramp_start} and {self.ramp_end}")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how.

    model: a name that `sdgp_accel.models.build` knows.
    data: ``"digits"`` (scikit-learn's), ``"cifar10"`` (torchvision's, on disk) or ``"imagefolder"`` (the folders
        ``train`` and ``val``, one folder for each class inside).
    batch_size: images per process and step; a last partial batch is left out.
    processes: how many processes `lr` was chosen for; another number is allowed and reported.
    lr, lr_start, lr_peak_epoch: see `schedule.learning_rate`; `lr_start` is a fraction of `lr`.
    weight_decay: of all parameters but BatchNorm's.
    amp: the autocast dtype; ``"float16"`` trains with a GradScaler.
    blur_pool: filter before strided convolutions (`blur_pool.add_blur_pool_`).
    test_flip: test on the mean of the logits of each image and its mirror image.
    resolution: for image folders only.
    workers: data-loading processes for each training process; image folders only. The data do not depend on it.
    sdgp: what is swapped in, or None for dense training; `sdgp_layers` says which layers are offered, `sdgp_schedule`
        in which part of the run they prune, e.g. ``{end: 0.9}`` or ``{start: 5, end: 135, unit: epochs}``.
    seed: of everything random. deterministic: only run-to-run deterministic GPU kernels.
    threads: CPU threads of each process, None for torch's choice. Sums on a CPU may depend on it.
    checkpoint_steps: save every so many steps besides every epoch; 0 for never.
    paper_top1: the accuracy in percent that the SDGP paper (arXiv:2202.00774) states for this run.
    note: what a reader should know of this recipe.

    Raises ValueError naming the field, the value and what is accepted.
    """

    model: str
    data: Literal["digits", "cifar10", "imagefolder"]
    epochs: int
    batch_size: int
    lr: float
    lr_peak_epoch: float
    lr_start: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    amp: Literal["none", "float16", "bfloat16"] = "none"
    channels_last: bool = True
    blur_pool: bool = False
    augment: Augment = Augment()
    test_flip: bool = False
    resolution: Resolution | None = None
    processes: int = 1
    workers: int = 4
    sdgp: SDGPConfig | None = None
    sdgp_layers: Literal["all", "conv2d"] = "all"
    sdgp_schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    deterministic: bool = False
    threads: int | None = None
    checkpoint_steps: int = 0
    paper_top1: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "processes", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "lr_start", "momentum", "weight_decay", "workers", "seed", "checkpoint_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative; got {getattr(self, name)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1; got {self.label_smoothing}")
        if not 0 < self.lr_peak_epoch < self.epochs:
            raise ValueError(f"lr_peak_epoch must be between 0 and epochs = {self.epochs}; got {self.lr_peak_epoch}")
        if (self.data == "imagefolder") != (self.resolution is not None):
            raise ValueError(f"resolution must be given for data = 'imagefolder', and only there; data = {self.data!r}")
        if self.sdgp_schedule.unit == "epochs" and self.sdgp_schedule.start >= self.epochs:
            raise ValueError(
                f"sdgp_schedule.start must be below epochs = {self.epochs}; got {self.sdgp_schedule.start} epochs"
            )
        if self.data == "imagefolder" and (self.augment.pad_crop or self.augment.cutout):
            raise ValueError(f"augment.pad_crop and augment.cutout must be 0 for image folders; got {self.augment}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dicts of plain values, as `recipe_from_dict` takes it."""
        values = dataclasses.asdict(self)
        if self.sdgp is not None and not isinstance(self.sdgp.prune, str):
            values["sdgp"]["prune"] = self.sdgp.functions._asdict()
        return values


def recipe_names() -> list[str]:
    """The built-in recipes that can be run, sorted."""
    names = (path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.yaml"))
    return sorted((name.as_posix() for name in names if not name.name.startswith("_")), key=_natural)


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The built-in recipe `name`, or the one in the YAML file `name`, with `overrides` merged over it.

    Raises FileNotFoundError for an unknown name, ValueError naming the file and the key for a bad file.
    """
    path = _find(str(name), Path.cwd())
    return recipe_from_dict(_merge(_read(path), overrides or {}), origin=str(name))


def recipe_from_dict(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """The checked recipe of nested plain `values`; errors start with `origin`."""
    try:
        recipe = _construct(Recipe, values, "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {error}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["lr=0.1", "sdgp.n=1"]`` as nested mappings; values are YAML. Raises ValueError for anything else."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not key or not equals:
            raise ValueError(f"an override must look like key=value; got {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key} must be given a YAML value; got {text!r}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        overrides = _merge(overrides, value)
    return overrides


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which numbers inside names compare as numbers: 2-8 before 2-16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace("-", "/").split("/")]


def _find(name: str, folder: Path) -> Path:
    for path in (RECIPES / f"{name}.yaml", folder / name):
        if path.is_file():
            return path
    close = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`sdgp train --list` shows them."
    raise FileNotFoundError(f"recipe must be a built-in name or a YAML file; got {name!r}: {hint}")


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in extended_by:
        raise ValueError(f"{path}: extends itself through {' -> '.join(map(str, extended_by))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of recipe fields; got {type(values).__name__}")
    if "extends" not in values:
        return values
    base = _find(str(values.pop("extends")), path.parent)
    return _merge(_read(base, (*extended_by, path)), values)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid over it: mappings key by key, anything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _construct(cls: type, values: object, where: str) -> object:
    """An instance of the dataclass `cls` from a mapping; `where` is the dotted path of the mapping."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{where or 'a recipe'} must be a mapping; got {values!r}")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [prefix + name for name in required if name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(hint: Any, value: object, where: str) -> object:
    """`value` as the field type `hint` wants it; raises TypeError or ValueError naming `where`."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
        # The one union with more than one option is SDGPConfig.prune, which checks itself.
        return _convert(options[0], value, where) if len(options) == 1 else value
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(hint)))}; got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _construct(hint, value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 5e-4, without a dot, as a string
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"{where} must be of type {hint.__name__}; got {value!r}")
