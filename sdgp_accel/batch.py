"""What a `DataLoader` yields, fed to a model: the one reading of `batch` shared by validate, benchmark and plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sdgp_accel import models

LossFn = Callable[[Any, Any], Tensor]


def split(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of `batch`: a tuple or list of two is that pair, anything else is inputs without targets."""
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise ValueError(f"batch as a {type(batch).__name__} must be (inputs, targets); got {len(batch)} items")
        return batch[0], batch[1]
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(
            f"batch must be a tensor, a mapping of keyword arguments or (inputs, targets); got {type(batch).__name__}"
        )
    return batch, None


def check_autocast(dtype: object) -> None:
    """Raise ValueError unless `dtype`, of ``torch.autocast`` around the forward pass, is one of 16 bits or None."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16; got {dtype!r}")


def forward(model: Callable[..., Any], batch: Any) -> Any:
    """Call `model` on the inputs of `batch`: a mapping as keyword arguments, a tuple as positional ones."""
    inputs, _ = split(batch)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def loss(output: Any, batch: Any, loss_fn: LossFn | None = None) -> Tensor:
    """The scalar to differentiate: `loss_fn(output, targets)`, else the output's own ``loss``, else cross-entropy
    against integer targets, else the mean square of every floating-point tensor in `output`."""
    _, targets = split(batch)
    if loss_fn is not None:
        return loss_fn(output, targets)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if isinstance(output, Tensor) and isinstance(targets, Tensor) and not targets.is_floating_point():
        return models.loss(output, targets)
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ValueError(f"no loss can be made of an output of type {type(output).__name__}; pass loss_fn")
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def check_loss_fn(loss_fn: object) -> None:
    """Raise TypeError unless `loss_fn` can be called or is None."""
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a callable (output, targets) -> scalar tensor, or None; got {loss_fn!r}")


def training_loss(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> Tensor:
    """`loss` of a forward pass on `batch`. Raises TypeError or ValueError unless it can be differentiated."""
    result: object = loss(forward(model, batch), batch, loss_fn)
    origin = "the loss in the output of model must be" if loss_fn is None else "loss_fn must return"
    if not isinstance(result, Tensor):
        raise TypeError(f"{origin} a scalar tensor; got {result!r} of type {type(result).__name__}")
    if result.numel() != 1 or not result.is_floating_point():
        raise ValueError(f"{origin} a scalar floating-point tensor; got {result.dtype} of shape {tuple(result.shape)}")
    if not result.requires_grad:
        raise ValueError(
            "model must have parameters with requires_grad=True that the loss depends on; got a loss that depends on "
            "none of them"
        )
    return result


def to(batch: Any, device: torch.device | str) -> Any:
    """`batch` with every tensor moved to `device` ("meta": shapes only)."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def size(batch: Any) -> int:
    """Samples in `batch`: the first dimension of its first tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() == 0:
        raise ValueError("batch holds no tensor with a batch dimension")
    return int(tensors[0].shape[0])
