"""The ``sdgp`` command: one module per subcommand, imported only when it is asked for."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from typing import Any

import click

# name -> (module, one-line help). The help stands here so that `sdgp --help` imports nothing heavy.
COMMANDS = {
    "bench": ("sdgp_accel.cli.bench", "Time the training step, dense and SDGP interleaved."),
    "validate": ("sdgp_accel.cli.validate", "Check every layer's gradients against float64 references."),
    "plan": ("sdgp_accel.cli.plan", "Predict the saving of each layer on a named GPU."),
    "train": ("sdgp_accel.cli.train", "Train by a recipe; without arguments, on embedded data."),
    "doctor": ("sdgp_accel.cli.doctor", "Say what is built, what this machine would use, and what is missing."),
}

# What a command raises because of its arguments or the machine. AssertionError: what torchvision, timm and torch raise
# for image sizes and missing GPUs; always with a text, unlike those that state what this package believes.
EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError, AssertionError)


class LazyGroup(click.Group):
    """A group whose subcommands live in modules named by `COMMANDS`, each exposing ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Expected errors that say why are one line and exit code 1, not a traceback; warnings are one line."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # no result is lost to a terminal that has no "×"
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # both are RuntimeErrors
            raise
        except BrokenPipeError:  # click ends quietly where the reader, `head` say, has had enough
            raise
        except EXPECTED_ERRORS as error:
            if not str(error):
                raise
            raise click.ClickException(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sdgp_accel")
def main() -> None:
    """Training that is measurably faster because its gradients are sparse."""
