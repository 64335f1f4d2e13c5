"""Options that several subcommands share: which model, and which `SDGPConfig`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import click

from sdgp_accel.config import FUNCTIONS, SCOPES, BackendName, Fallback, PassMode, SDGPConfig

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """MODEL, --image-size and --seq-len, passed on under those names."""
    for decorate in (
        click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample of a language model."),
        click.option("--image-size", type=click.IntRange(min=1), help="Height and width of an image model's input."),
        click.argument("model", default="resnet9"),
    ):
        command = decorate(command)
    return command


def config_options(command: Command) -> Command:
    """The fields of `SDGPConfig` as options, passed on as one argument ``config``."""

    @functools.wraps(command)
    def with_config(
        prune: str,
        pattern: str,
        grad_input: PassMode,
        grad_weight: PassMode,
        scope: Any,
        backend: BackendName,
        fallback: Fallback,
        **others: Any,
    ) -> Any:
        try:
            n, m = (int(part) for part in pattern.split(":"))
        except ValueError:
            raise click.BadParameter(f"must look like 2:4; got {pattern!r}", param_hint="--pattern") from None
        try:
            config = SDGPConfig(
                prune=prune,
                n=n,
                m=m,
                grad_input=grad_input,
                grad_weight=grad_weight,
                scope=scope,
                backend=backend,
                fallback=fallback,
            )
        except (ValueError, TypeError) as error:
            raise click.UsageError(str(error)) from error
        return command(config=config, **others)

    decorated: Command = with_config
    for decorate in (
        click.option("--fallback", type=click.Choice(get_args(Fallback)), default="dense", help="Without kernels."),
        click.option("--backend", type=click.Choice(get_args(BackendName)), default="auto", help="What runs it."),
        click.option("--scope", type=click.Choice(SCOPES), help="Of rescale_magnitude's sums."),
        click.option("--grad-weight", type=click.Choice(get_args(PassMode)), default="sparse", help="Weight gradient."),
        click.option("--grad-input", type=click.Choice(get_args(PassMode)), default="sparse", help="Input gradient."),
        click.option("--pattern", default="2:4", metavar="N:M", help="Keep at most N of every M values."),
        click.option("--prune", type=click.Choice(FUNCTIONS), default="mvue", help="Prune function."),
    ):
        decorated = decorate(decorated)
    return decorated
