"""What a user can get wrong, in every command: one clear line and an exit code, never a traceback; found before the
work, where that is possible.
"""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sdgp_accel.cli import COMMANDS, main

pytestmark = pytest.mark.filterwarnings("ignore:device 'cpu' has no sparse tensor cores")

QUICK_BENCH = ("bench", "digits", "--device", "cpu", "--batch", "2", "--steps", "1", "--warmup", "0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file that is no folder, no checkpoint and no YAML."""
    monkeypatch.chdir(tmp_path)
    for name in ("file", "checkpoint.pt", "recipe.yaml"):
        (tmp_path / name).write_text("a: b: c")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("plan", "resnet9", "--image-size", "4"), 1, "with --image-size 4: the forward of ResNet9 cannot run"),
        (
            ("plan", "vit_b_16", "--image-size", "100"),
            1,
            "with --image-size 100: Input shape indivisible by patch size",
        ),
        (("plan", "gpt", "--image-size", "32"), 1, "image_size must be None: gpt is a language model; got 32"),
        (("plan", "digits", "--seq-len", "8"), 1, "seq_len must be None: digits is an image classifier; got 8"),
        (("plan", "resnet5"), 1, "model 'resnet5' is neither"),
        (("plan", "timm/resnet5"), 1, "did you mean 'resnet50'?"),
        (("plan", "deeplabv3_resnet50"), 1, "nor a classifier of torchvision or timm"),  # but of torchvision's
        (("plan", "digits", "--backend", "cutlass"), 2, "No such option"),  # it would change nothing
        (("plan", "digits", "--batch", "0"), 2, "0 is not in the range x>=1"),
        (("plan", "digits", "--json", "file/plan.json"), 2, "Folder 'file' cannot be made"),
        (("plan", "digits", "--json", "."), 2, "File '.' is a directory"),
        (("doctor", "resnet9", "--image-size", "4"), 1, "with --image-size 4: the forward of ResNet9 cannot run"),
        (("doctor", "no_such_model"), 1, "no_such_model"),
        (("validate", "digits", "--json", "file/checks.json"), 2, "Folder 'file' cannot be made"),
        (("validate", "digits", "--device", "cpu", "--draws", "1"), 1, "draws must be 0 or an int >= 2; got 1"),
        (("validate", "digits", "--device", "cpu", "--backend", "cutlass"), 1, "backend='cutlass' needs a CUDA device"),
        ((*QUICK_BENCH, "--backend", "cutlass"), 1, "backend='cutlass' needs a CUDA device"),
        ((*QUICK_BENCH, "--json", "file/r.json"), 2, "Folder 'file' cannot be made"),
        ((*QUICK_BENCH, "--html", "file/r.html"), 2, "Folder 'file' cannot be made"),
        (("bench", "resnet9", "--device", "cpu", "--image-size", "4"), 1, "with --image-size 4: "),
        (("validate", "vit_b_16", "--image-size", "100"), 1, "with --image-size 100: Input shape indivisible"),
        (("train", "recipe.yaml"), 1, "not YAML"),
        (("train", "digits", "--set", "lr=[1"), 1, "lr must be given a YAML value; got '[1'"),
        (("train", "digits", "--set", "sdgp.backend=cutlass", "--device", "cpu"), 1, "needs a CUDA device"),
        (("train", "digits", "--set", "lr=1e9", "--device", "cpu"), 1, "training has diverged"),
        (("train", "--resume", "--output-dir", "."), 1, "must be a checkpoint of format 1; torch cannot read it"),
        (("train", "digits", "--resume", "--output-dir", "."), 1, "must be a checkpoint of format 1"),
    ],
)
def test_mistakes_are_named_without_a_traceback(
    arguments: tuple[str, ...], exit_code: int, message: str, folder: Path
) -> None:
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    assert message in result.output


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    result = CliRunner().invoke(main, ["plan", "digits", "--json", "new/plan.json"])
    assert result.exit_code == 2
    assert "Folder 'new' is not writable" in result.output


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise AssertionError

    monkeypatch.setattr("sdgp_accel.cli.doctor.command", click.Command("doctor", callback=fails))
    assert isinstance(CliRunner().invoke(main, ["doctor"]).exception, AssertionError)


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sdgp_accel.cli.doctor.command", click.Command("doctor", callback=fails))
    result = CliRunner().invoke(main, ["doctor"])
    assert isinstance(result.exception, SystemExit)
    assert result.output == ""


def test_a_terminal_without_the_characters_shows_the_rest() -> None:
    result = CliRunner(charset="ascii").invoke(main, ["plan", "digits"])
    assert result.exit_code == 0, result.output
    assert "4096?288?64" in result.output


def test_a_narrow_terminal_loses_no_labels() -> None:
    result = CliRunner().invoke(main, ["plan", "digits"], env={"COLUMNS": "60"})
    assert "features.3.0" in result.output


def test_warnings_are_single_lines_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns() -> None:
        warnings.warn("slow today", stacklevel=1)
        click.echo("done")

    monkeypatch.setattr("sdgp_accel.cli.doctor.command", click.Command("doctor", callback=warns))
    result = CliRunner().invoke(main, ["doctor"])
    assert (result.stdout, result.stderr) == ("done\n", "Warning: slow today\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    parameters = main.get_command(click.Context(main), command).params
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    assert options
    assert all(option.help for option in options), [option.name for option in options if not option.help]
