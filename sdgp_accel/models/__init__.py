"""Models to benchmark and train: built by name, with a batch to feed them and a loss.

| name | model | inputs |
| --- | --- | --- |
| ``resnet9`` | the paper's CIFAR-10 net | images [B, 3, 32, 32] |
| ``digits`` | small convolutional net | images [B, 1, 8, 8] |
| ``gpt``, ``gpt-tiny``, ``gpt-block``, ``gpt2``, ``gpt2-medium``, .., ``gpt2-xl`` | decoder | tokens [B, T] |
| ``conv_lm`` | causal dilated Conv2d language model | tokens [B, T] |
| anything else | torchvision's or timm's classifier of that name (``timm/...`` forces timm) | images [B, 3, 224, 224] |
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_accel.models import external
from sdgp_accel.models.conv_lm import ConvLM
from sdgp_accel.models.digits import DigitsNet
from sdgp_accel.models.gpt import GPT, SIZES, GPTConfig
from sdgp_accel.models.resnet9 import ResNet9

__all__ = ["GPT", "Batch", "ConvLM", "DigitsNet", "GPTConfig", "ResNet9", "build", "example_batch", "loss", "names"]

CONV_LM_SEQ_LEN = 256
_IMAGES = {"resnet9": (3, 32, 10), "digits": (1, 8, 10)}  # channels, size, classes


class Batch(NamedTuple):
    """What a model is fed and what it is to predict."""

    inputs: Tensor
    targets: Tensor


def names() -> tuple[str, ...]:
    """This package's own models; torchvision's and timm's can be built too."""
    return ("resnet9", "digits", "conv_lm", *SIZES)


def build(
    name: str,
    num_classes: int | None = None,
    *,
    image_size: int | None = None,
    seq_len: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build the model `name` with random weights from torch's global generator, on the default device.

    num_classes: classes of a classifier or vocabulary of a language model; None for the model's own.
    image_size, seq_len: what the model will be fed, for models with learned positions (ViTs, GPT); others take
        any size. Only one of them can be given: that of the model's kind.
    options: passed to the constructor, e.g. ``layers=4, width=256`` for ``gpt``.

    Raises ValueError for a name nobody knows and for a size of the wrong kind, ModuleNotFoundError where torchvision
    or timm is missing, TypeError for an option that the model does not have.
    """
    _check_positive(num_classes=num_classes, image_size=image_size, seq_len=seq_len)
    _check_kind(name, image_size, seq_len)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    vocabulary = {} if num_classes is None else {"vocab_size": num_classes}
    if name == "resnet9":
        return ResNet9(**classes, **options)
    if name == "digits":
        return DigitsNet(**classes, **options)
    if name == "conv_lm":
        return ConvLM(**vocabulary, **options)
    if name in SIZES:
        unknown = set(options) - {field.name for field in fields(GPTConfig)}
        if unknown:
            accepted = ", ".join(field.name for field in fields(GPTConfig))
            raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}; accepted: {accepted}")
        context = {} if seq_len is None else {"context": seq_len}
        return GPT(replace(SIZES[name], **{**vocabulary, **context, **options}))
    return external.build(name, num_classes, image_size, **options)


def example_batch(
    name: str,
    batch: int,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    seq_len: int | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Batch:
    """A random batch for `name`: standard normal images and random classes, or random tokens and the next ones.

    Images are float32 [batch, C, image_size, image_size] with int64 targets [batch]; tokens are int64
    [batch, seq_len] with int64 targets [batch, seq_len]. None means the model's own size. `device` may be "meta".
    """
    _check_positive(batch=batch, num_classes=num_classes, image_size=image_size, seq_len=seq_len)
    _check_kind(name, image_size, seq_len)
    if _reads_text(name):
        vocabulary = num_classes or (SIZES[name].vocab_size if name in SIZES else 256)
        length = seq_len or (SIZES[name].context if name in SIZES else CONV_LM_SEQ_LEN)
        text = torch.randint(vocabulary, (batch, length + 1), device=device, generator=generator)
        return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous())
    channels, size, classes = _IMAGES[name] if name in _IMAGES else (3, external.input_size(name), 1000)
    size = image_size or size
    images = torch.randn(batch, channels, size, size, device=device, generator=generator)
    return Batch(images, torch.randint(num_classes or classes, (batch,), device=device, generator=generator))


def loss(output: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [..., classes] and targets [...] int64, for every model of this package."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def _reads_text(name: str) -> bool:
    return name in SIZES or name == "conv_lm"


def _check_kind(name: str, image_size: int | None, seq_len: int | None) -> None:
    argument, value = ("image_size", image_size) if _reads_text(name) else ("seq_len", seq_len)
    if value is not None:
        kind = "a language model" if _reads_text(name) else "an image classifier"
        raise ValueError(f"{argument} must be None: {name} is {kind}; got {value}")


def _check_positive(**values: int | None) -> None:
    for argument, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} must be an int >= 1; got {value!r}")
