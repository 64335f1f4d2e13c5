"""Training by recipe: ``train(load_recipe("digits"), Path("runs/digits"))``."""

from sdgp_accel.training.loop import Result, train
from sdgp_accel.training.recipe import Augment, Recipe, Resolution, load_recipe, recipe_from_dict, recipe_names

__all__ = ["Augment", "Recipe", "Resolution", "Result", "load_recipe", "recipe_from_dict", "recipe_names", "train"]
