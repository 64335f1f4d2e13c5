"""``sdgp train``: the recipes, built in or your own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from sdgp_accel.cli.options import output
from sdgp_accel.config import FUNCTIONS, SDGPConfig
from sdgp_accel.training import Recipe, load_recipe, recipe_names, train
from sdgp_accel.training.checkpoint import saved_recipe
from sdgp_accel.training.loop import CHECKPOINT
from sdgp_accel.training.recipe import DEFAULT_RECIPE, parse_overrides


@click.command()
@click.argument("recipe", required=False)
@click.option("--list", "list_recipes", is_flag=True, help="Show the built-in recipes and stop.")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Where the data are.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkpoint, log and weights.  [default: runs/RECIPE-TIME]",
)
@click.option("--function", type=click.Choice(("dense", *FUNCTIONS)), help="Prune with this, or not at all.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Override a field, e.g. sdgp.n=1.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --output-dir.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[default: cuda where there is a GPU]")
def command(
    recipe: str | None,
    list_recipes: bool,
    data_dir: Path | None,
    output_dir: Path | None,
    function: str | None,
    assignments: tuple[str, ...],
    resume: bool,
    device: str | None,
) -> None:
    """Train by RECIPE: a built-in name (see --list) or a YAML file.

    Without arguments: scikit-learn's digits with the default pruning, about a minute on two cores. On several GPUs:
    torchrun --nproc-per-node 4 -m sdgp_accel train RECIPE ... With --resume, RECIPE defaults to the checkpoint's.
    """
    if list_recipes:
        output().print(recipe_table())
        return
    if resume and output_dir is None:
        raise click.UsageError("--resume needs --output-dir, the folder that holds the checkpoint")
    overrides = parse_overrides(assignments)
    if resume and recipe is None and output_dir is not None:
        if assignments or function:
            raise ValueError("--set and --function need RECIPE; a run resumed without it keeps its own recipe")
        chosen = saved_recipe(output_dir / CHECKPOINT)
    else:
        chosen = with_function(load_recipe(recipe or DEFAULT_RECIPE, overrides), function)
    if output_dir is None:
        name = Path(recipe or DEFAULT_RECIPE).with_suffix("").name
        output_dir = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    train(chosen, output_dir, data_dir, resume, device)


def with_function(recipe: Recipe, function: str | None) -> Recipe:
    """`recipe` pruned with `function` in both passes, dense for ``"dense"``, unchanged for None."""
    if function is None:
        return recipe
    if function == "dense":
        return replace(recipe, sdgp=None)
    return replace(recipe, sdgp=replace(recipe.sdgp or SDGPConfig(), prune=function))


def recipe_table() -> Table:
    """The built-in recipes, one in each row, with their notes below."""
    title = "Recipes, and the top-1 accuracy the SDGP paper states"
    table = Table(title=title, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("pruned to", no_wrap=True)
    table.add_column("paper", justify="right")
    notes: list[str] = []
    for name in recipe_names():
        recipe = load_recipe(name)
        pruning = "dense"
        if recipe.sdgp is not None:
            pruning = f"{recipe.sdgp.n}:{recipe.sdgp.m} {' / '.join(dict.fromkeys(recipe.sdgp.functions))}"
        top1 = "" if recipe.paper_top1 is None else f"{recipe.paper_top1:.1f} %"
        if recipe.note:
            if recipe.note not in notes:
                notes.append(recipe.note)
            top1 += f" [{notes.index(recipe.note) + 1}]"
        table.add_row(name, pruning, Text(top1))
    table.caption = Text("\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1)))
    return table
