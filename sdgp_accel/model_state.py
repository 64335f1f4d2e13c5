"""Running a model, to measure or to check it, without a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sdgp_accel.nn import SDGPLayer
from sdgp_accel.swap import restore_layer, swap_layer


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back classes, configurations and switches, gradients, buffers and the random state of `model`.

    What its parameters have registered to run after their gradients (`Tensor.register_post_accumulate_grad_hook`), an
    optimizer's step perhaps, does not run meanwhile, and what torch.compile has wrapped runs eagerly: hooks on layers
    would break its graphs. Raises ValueError for a model on the meta device, which cannot run.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must be on a device that computes; got parameters on meta")
    before = {
        module: (module.sdgp_config, module.sdgp_active) if isinstance(module, SDGPLayer) else None
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    assigned = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [(found, dict(found)) for parameter, _ in gradients if (found := parameter._post_accumulate_grad_hooks)]
    for registered, _ in hooks:
        registered.clear()  # autograd holds this very dictionary
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, state in before.items():
            if state is not None:
                swap_layer(module, state[0])
                assert isinstance(module, SDGPLayer)
                module.sdgp_active = state[1]
            elif isinstance(module, SDGPLayer):
                restore_layer(module)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for registered, kept in hooks:
            registered.update(kept)
        for names, kept in assigned:
            names.update(kept)
        for buffer, value in buffers:
            # What cannot be written to (expanded, made in inference mode) has not changed.
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                buffer.copy_(value)


@contextlib.contextmanager
def buffers_of_its_own(model: nn.Module) -> Iterator[None]:
    """Keeps the forward of DistributedDataParallel from broadcasting buffers, in which every rank has to take part."""
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.require_forward_param_sync = False
    try:
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = value
