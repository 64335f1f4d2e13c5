"""Image classifiers of torchvision and timm by name, randomly initialised (nothing is downloaded)."""

from __future__ import annotations

import difflib
import importlib
import warnings
from types import ModuleType
from typing import Any

from torch import nn

# torchvision heads that exist only while training, which would make the output a tuple.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
_TORCHVISION_SIZES = {"inception_v3": 299}
_LIBRARIES = ("torchvision", "timm")


def library_of(name: str) -> tuple[str, str]:
    """(library, model name) of ``"resnet50"``, ``"timm/resnet50"`` or ``"torchvision/resnet50"``.

    A name that both libraries know is torchvision's. ModuleNotFoundError where no library is installed that could
    know the name, ValueError where those installed do not.
    """
    prefix, slash, rest = name.partition("/")
    wanted = (prefix,) if slash and prefix in _LIBRARIES else _LIBRARIES
    model = rest if slash and prefix in _LIBRARIES else name
    missing = []
    for library in wanted:
        module = _import(library)
        if module is None:
            missing.append(library)
        elif model in _names(library, module):
            return library, model
    if missing:
        raise ModuleNotFoundError(
            f"model {name!r} is not one of this package's own, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'sdgp_accel[vision]'"
        )
    known = [model for library in wanted for model in _names(library, _require(library))]
    close = difflib.get_close_matches(model, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"model {name!r} is neither one of this package's own nor a classifier of {' or '.join(wanted)}{hint}"
    )


def build(name: str, num_classes: int | None, image_size: int | None, **options: Any) -> nn.Module:
    """The model, with random weights; `num_classes` None means 1000."""
    library, model = library_of(name)
    classes = 1000 if num_classes is None else num_classes
    built: nn.Module
    if library == "timm":
        if image_size is not None and not _fixed_size(model):
            image_size = None  # timm's convolutional nets take any size and no such argument
        size = {} if image_size is None else {"img_size": image_size}
        built = _require("timm").create_model(model, pretrained=False, num_classes=classes, **size, **options)
        return built
    size = {} if image_size is None or not model.startswith("vit_") else {"image_size": image_size}
    settings = {"num_classes": classes, **_TORCHVISION_OPTIONS.get(model, {}), **size, **options}
    built = _require("torchvision").models.get_model(model, weights=None, **settings)
    return built


def input_size(name: str) -> int:
    """Height and width of the images `name` was designed for."""
    library, model = library_of(name)
    if library == "torchvision":
        return _TORCHVISION_SIZES.get(model, 224)
    config = _require("timm").get_pretrained_cfg(model)
    return 224 if config is None else int(config.input_size[-1])


def _fixed_size(model: str) -> bool:
    config = _require("timm").get_pretrained_cfg(model)
    return config is not None and bool(config.fixed_input_size)


def _names(library: str, module: ModuleType) -> list[str]:
    names: list[str] = module.models.list_models(module.models) if library == "torchvision" else module.list_models()
    return names


def _import(library: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both warn on import about optional parts nobody asked for
            return importlib.import_module(library)
    except ModuleNotFoundError:
        return None


def _require(library: str) -> ModuleType:
    module = _import(library)
    assert module is not None, library
    return module
