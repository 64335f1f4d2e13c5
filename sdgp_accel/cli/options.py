"""What several subcommands share: options that say which model and which `SDGPConfig`, and the console."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from sdgp_accel.config import FUNCTIONS, SCOPES, BackendName, Fallback, PassMode, SDGPConfig

Command = Callable[..., Any]


WIDTH = 80  # columns that the tables need


def output() -> Console:
    """The console of standard output. A narrower terminal wraps the lines of a table, which would lose its labels."""
    console = Console()
    console.width = max(console.width, WIDTH)
    return console


class OutputFile(click.Path):
    """A file that is written when the work is done: its folder is made, and refused, before the work begins."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; fails where no file can be written there."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.fail(f"Folder {str(path.parent)!r} cannot be made: {error.strerror}.", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"Folder {str(path.parent)!r} is not writable.", param, ctx)
        return path


def model_options(command: Command) -> Command:
    """MODEL, --image-size and --seq-len, passed on under those names."""
    decorated: Command = click.argument("model", default="resnet9")(size_options(command))
    return decorated


def size_options(command: Command) -> Command:
    """--image-size and --seq-len, which are named where building or running a model of that size fails: torch and the
    libraries of models do not know them.
    """

    @functools.wraps(command)
    def with_sizes(image_size: int | None, seq_len: int | None, **others: Any) -> Any:
        given = [f"{option} {size}" for option, size in (("--image-size", image_size), ("--seq-len", seq_len)) if size]
        try:
            return command(image_size=image_size, seq_len=seq_len, **others)
        except (click.exceptions.Exit, click.Abort):  # both are RuntimeErrors
            raise
        except (AssertionError, RuntimeError) as error:
            if not given or not str(error):
                raise
            raise RuntimeError(f"with {' and '.join(given)}: {error}") from error

    decorated: Command = with_sizes
    for decorate in (
        click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample of a language model."),
        click.option("--image-size", type=click.IntRange(min=1), help="Height and width of an image model's input."),
    ):
        decorated = decorate(decorated)
    return decorated


def config_options(command: Command) -> Command:
    """The fields of `SDGPConfig` as options, passed on as one argument ``config``."""

    @functools.wraps(command)
    def with_backend(config: SDGPConfig, backend: BackendName, fallback: Fallback, **others: Any) -> Any:
        return command(config=replace(config, backend=backend, fallback=fallback), **others)

    backends, fallbacks = (click.Choice(get_args(names)) for names in (BackendName, Fallback))
    decorated: Command = with_backend
    for decorate in (
        click.option("--fallback", type=fallbacks, default="dense", help="What runs layers that the kernels cannot."),
        click.option("--backend", type=backends, default="auto", help="What runs the backward."),
        pruning_options,
    ):
        decorated = decorate(decorated)
    return decorated


def pruning_options(command: Command) -> Command:
    """Those of them that say what is pruned and not by what, alike as ``config``."""

    @functools.wraps(command)
    def with_config(
        prune: str, pattern: str, grad_input: PassMode, grad_weight: PassMode, scope: Any, **others: Any
    ) -> Any:
        try:
            n, m = (int(part) for part in pattern.split(":"))
        except ValueError:
            raise click.BadParameter(f"must look like 2:4; got {pattern!r}", param_hint="--pattern") from None
        try:
            config = SDGPConfig(prune=prune, n=n, m=m, grad_input=grad_input, grad_weight=grad_weight, scope=scope)
        except (ValueError, TypeError) as error:
            raise click.UsageError(str(error)) from error
        return command(config=config, **others)

    scopes, modes = click.Choice(SCOPES), click.Choice(get_args(PassMode))
    decorated: Command = with_config
    for decorate in (
        click.option(
            "--scope", type=scopes, help="Of rescale_magnitude's sums.  [default: group; of Conv2d sample_channel]"
        ),
        click.option("--grad-weight", type=modes, default="sparse", help="Pass of the weights' gradients."),
        click.option("--grad-input", type=modes, default="sparse", help="Pass of the inputs' gradients."),
        click.option("--pattern", default="2:4", metavar="N:M", help="Keep at most N of every M values."),
        click.option("--prune", type=click.Choice(FUNCTIONS), default="mvue", help="Prune function."),
    ):
        decorated = decorate(decorated)
    return decorated
