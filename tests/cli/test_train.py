"""`sdgp train` as typed."""

import csv

import pytest
from click.testing import CliRunner

from sdgp_accel.cli import main
from sdgp_accel.training import load_recipe, recipe_names

SHORT = ("--set", "epochs=2", "--set", "lr_peak_epoch=1", "--function", "dense")


def run(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_list_shows_every_recipe_with_the_papers_result(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in recipe_names())
    (line,) = (line for line in result.output.splitlines() if "cifar10/rescale-16-32" in line)
    assert "16:32" in line
    assert "95.3 %" in line
    recipes = {name: load_recipe(name) for name in recipe_names()}
    notes = list(dict.fromkeys(recipe.note for recipe in recipes.values() if recipe.note))
    assert notes
    for name, recipe in recipes.items():
        (line,) = (line for line in result.output.splitlines() if line.split()[:1] == [name])
        assert f"[{notes.index(recipe.note) + 1}]" in line if recipe.note else "[" not in line
    for number, note in enumerate(notes, start=1):
        assert f"[{number}] {note[:60]}" in result.output


def test_train_log_and_resume(tmp_path):
    output_dir = tmp_path / "run"
    result = run("--output-dir", output_dir, *SHORT)
    assert result.exit_code == 0, result.output
    assert "digits on digits, dense" in result.output
    assert "epoch 2/2" in result.output
    assert "\x1b" not in result.output  # no bars, no colours where nobody looks
    rows = list(csv.DictReader((output_dir / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert f"test accuracy: {float(rows[-1]['accuracy']):.2f} %" in result.output
    assert list(output_dir.glob("events.out.tfevents.*"))
    assert run("--output-dir", output_dir, "--resume").exit_code == 0  # the recipe is the checkpoint's


def test_default_output_dir_is_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*SHORT).exit_code == 0
    assert len(list(tmp_path.glob("runs/digits-*/weights.pt"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "did you mean 'digits'?"),
        (("--set", "epoch=2"), "unknown key epoch; did you mean epochs?"),
        (("--set", "epochs"), "must look like key=value; got 'epochs'"),
        (("--function", "biggest"), "'biggest' is not one of 'dense', 'magnitude'"),
        (("--resume",), "--resume needs --output-dir"),
        (("--resume", "--output-dir", "nowhere"), "there is no nowhere/checkpoint.pt"),
        (("--resume", "--output-dir", "nowhere", "--function", "mvue"), "need RECIPE"),
        (("cifar10/dense",), "data_dir must name the folder"),
        (("cifar10/dense", "--data-dir", "."), "must hold the folder cifar-10-batches-py"),
        (("--data-dir", "nowhere"), "does not exist"),
    ],
)
def test_mistakes_are_named_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "runs").exists()
