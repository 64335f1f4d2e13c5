"""Recipes: the built-in ones against the paper's tables and hyper-parameters, and the loader's rules and errors."""

from pathlib import Path

import pytest

from sdgp_accel import models
from sdgp_accel.config import SDGPConfig
from sdgp_accel.schedule import Schedule
from sdgp_accel.training.recipe import (
    RECIPES,
    Augment,
    Recipe,
    Resolution,
    load_recipe,
    parse_overrides,
    recipe_from_dict,
    recipe_names,
)

# The tables of arXiv:2202.00774: (function, n, m) -> top-1 accuracy in percent.
DENSE = None
CIFAR10 = {
    DENSE: 95.3,
    ("random", 2, 4): 94.5,
    ("magnitude", 2, 4): 95.2,
    ("rescale_magnitude", 1, 4): 95.1,
    ("rescale_magnitude", 2, 4): 95.2,
    ("rescale_magnitude", 1, 8): 94.7,
    ("rescale_magnitude", 2, 8): 95.1,
    ("rescale_magnitude", 4, 8): 95.2,
    ("rescale_magnitude", 2, 16): 95.1,
    ("rescale_magnitude", 4, 16): 95.2,
    ("rescale_magnitude", 8, 16): 95.2,
    ("rescale_magnitude", 4, 32): 94.9,
    ("rescale_magnitude", 8, 32): 95.3,
    ("rescale_magnitude", 16, 32): 95.3,
}
IMAGENET_METHODS = (DENSE, ("random", 2, 4), ("magnitude", 2, 4), ("rescale_magnitude", 2, 4))
IMAGENET = {
    "resnet18": (71.4, 64.3, 72.1, 72.4),
    "resnet50": (78.1, 70.3, 77.7, 77.6),
    "regnet_x_400mf": (73.3, 64.3, 72.1, 72.4),
}


def pruning_of(recipe: Recipe):
    if recipe.sdgp is None:
        return DENSE
    assert recipe.sdgp == SDGPConfig(
        prune=recipe.sdgp.prune,
        n=recipe.sdgp.n,
        m=recipe.sdgp.m,
        grad_input="sparse",
        grad_weight="dense",
        scope="sample_channel",
        eps=1e-4,
        backend="reference",
        fallback="emulate",
    )
    assert recipe.sdgp_layers == "conv2d"
    return (recipe.sdgp.prune, recipe.sdgp.n, recipe.sdgp.m)


def built_in(folder: str) -> list[Recipe]:
    return [load_recipe(name) for name in recipe_names() if name.startswith(folder)]


def test_cifar10_recipes_are_the_papers_rows():
    recipes = built_in("cifar10/")
    assert len(recipes) == len(CIFAR10) == 14
    assert {pruning_of(recipe): recipe.paper_top1 for recipe in recipes} == CIFAR10


def test_imagenet_recipes_are_the_papers_rows():
    recipes = built_in("imagenet/")
    assert len(recipes) == 12
    expected = {
        (model, method): top1
        for model, row in IMAGENET.items()
        for method, top1 in zip(IMAGENET_METHODS, row, strict=True)
    }
    assert {(recipe.model, pruning_of(recipe)): recipe.paper_top1 for recipe in recipes} == expected


@pytest.mark.parametrize("recipe", built_in("cifar10/"), ids=lambda recipe: str(pruning_of(recipe)))
def test_cifar10_hyper_parameters(recipe):
    assert recipe == Recipe(
        model="resnet9",
        data="cifar10",
        epochs=150,
        batch_size=512,
        lr=0.5,
        lr_peak_epoch=5,
        lr_start=1e-4,  # 0.5e-4 in all
        momentum=0.9,
        weight_decay=5e-4,
        label_smoothing=0.1,
        amp="float16",
        channels_last=True,
        augment=Augment(flip=True, pad_crop=2, cutout=4),
        test_flip=True,
        sdgp=recipe.sdgp,
        sdgp_layers="conv2d",
        paper_top1=recipe.paper_top1,
    )


@pytest.mark.parametrize("recipe", built_in("imagenet/"), ids=lambda r: f"{r.model}-{r.sdgp and r.sdgp.prune}")
def test_imagenet_hyper_parameters(recipe):
    large = recipe.model == "resnet50"
    assert recipe == Recipe(
        model=recipe.model,
        data="imagefolder",
        epochs=88,
        batch_size=512 if large else 1024,
        processes=4,
        lr=1.7 if large else 1.0,
        lr_peak_epoch=2,
        momentum=0.9,
        weight_decay=1e-4 if large else 5e-5,
        label_smoothing=0.1,
        amp="float16",
        channels_last=True,
        blur_pool=True,
        augment=Augment(flip=True),
        test_flip=True,
        resolution=Resolution(start=160, end=192, ramp_start=65, ramp_end=76, test=256),
        workers=12,
        sdgp=recipe.sdgp,
        sdgp_layers="conv2d",
        paper_top1=recipe.paper_top1,
        note=recipe.note,
    )
    assert ("unverified" in recipe.note) == (recipe.model == "regnet_x_400mf" and recipe.sdgp is not None)


def test_every_recipe_names_a_model_and_survives_a_round_trip():
    recipes = [load_recipe(name) for name in recipe_names()]
    for recipe in recipes:
        assert recipe_from_dict(recipe.to_dict()) == recipe
    for model in {recipe.model for recipe in recipes}:
        models.build(model, num_classes=10)


def test_rows_do_not_repeat_their_base():
    for name in recipe_names():
        if "/" in name:
            lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            assert {line.split(":")[0] for line in lines} <= {"extends", "paper_top1", "sdgp", "note"}


def test_own_recipe_extends_a_built_in_one_and_a_neighbour(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("extends: cifar10/rescale-2-4\nepochs: 30\nsdgp: {m: 8}\n")
    functions = "{prune: {grad_input: mvue, grad_weight: random}}"
    (tmp_path / "variant.yaml").write_text(f"extends: mine.yaml\nsdgp: {functions}\n")
    recipe = load_recipe(tmp_path / "variant.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.sdgp.n, recipe.sdgp.m, recipe.sdgp.eps) == (30, 512, 2, 8, 1e-4)
    assert recipe.sdgp.functions == ("mvue", "random")
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_overrides_are_merged_and_typed():
    overrides = parse_overrides(["lr=5e-2", "sdgp.n=1", "augment.flip=true", "sdgp.eps=1e-3", "epochs=7"])
    recipe = load_recipe("digits", overrides)
    assert (recipe.lr, recipe.sdgp.n, recipe.sdgp.m, recipe.sdgp.eps, recipe.epochs) == (0.05, 1, 4, 1e-3, 7)
    assert recipe.augment == Augment(flip=True, pad_crop=1)
    assert load_recipe("digits", parse_overrides(["sdgp=null"])).sdgp is None
    assert load_recipe("digits").sdgp_schedule == Schedule()
    scheduled = load_recipe("digits", parse_overrides(["sdgp_schedule.end=18", "sdgp_schedule.unit=epochs"]))
    assert scheduled.sdgp_schedule == Schedule(end=18.0, unit="epochs")
    assert recipe_from_dict(scheduled.to_dict()) == scheduled


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lrr=1", "digits: unknown key lrr; did you mean lr?"),
        ("sdgp.mm=1", "unknown key sdgp.mm; did you mean sdgp.m?"),
        ("zzz=1", "unknown key zzz; known: model, data"),
        ("epochs=many", "epochs must be of type int; got 'many'"),
        ("epochs=true", "epochs must be of type int; got True"),
        ("epochs=0", "epochs must be at least 1; got 0"),
        ("threads=0", "threads must be at least 1; got 0"),
        ("processes=0", "processes must be at least 1; got 0"),
        ("batch_size=0", "batch_size must be at least 1; got 0"),
        ("lr=.inf", "lr must be finite and not negative; got inf"),
        *(
            (f"{name}=-1", f"{name} must be finite and not negative; got -1")
            for name in ("lr_start", "momentum", "weight_decay", "workers", "seed", "checkpoint_steps")
        ),
        ("lr_peak_epoch=0", r"lr_peak_epoch must be between 0 and epochs = 20; got 0"),
        ("lr_peak_epoch=20", r"lr_peak_epoch must be between 0 and epochs = 20; got 20"),
        ("epochs=null", "epochs must be of type int; got None"),
        ("epochs=2", r"lr_peak_epoch must be between 0 and epochs = 2; got 4.0"),
        ("lr=fast", "lr must be of type float; got 'fast'"),
        ("lr=.nan", "lr must be finite and not negative; got nan"),
        ("amp=fp16", "amp must be one of 'none', 'float16', 'bfloat16'; got 'fp16'"),
        ("augment=3", "augment must be a mapping; got 3"),
        ("label_smoothing=2", "label_smoothing must be between 0 and 1; got 2.0"),
        ("sdgp.n=5", "n must be between 1 and m = 4; got 5"),
        ("sdgp.prune=biggest", "prune must be one of 'magnitude'.*; got 'biggest'"),
        ("sdgp_schedule.end=1.5", "end must be greater than start = 0.0 and at most 1 fraction; got 1.5"),
        ("sdgp_schedule.until=0.9", "unknown key sdgp_schedule.until; did you mean sdgp_schedule.unit?"),
        ("sdgp_schedule={start: 20, unit: epochs}", "sdgp_schedule.start must be below epochs = 20; got 20"),
        ("sdgp_schedule=0.9", "sdgp_schedule must be a mapping; got 0.9"),
        ("data=imagefolder", "resolution must be given for data = 'imagefolder'"),
        ("resolution={start: 32, end: 64, ramp_start: 1, ramp_end: 2, test: 64}", "and only there; data = 'digits'"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("digits", parse_overrides([override]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: digits\n", "missing data, epochs, batch_size, lr, lr_peak_epoch"),
        ("- 1\n", "must be a mapping of recipe fields; got list"),
        ("a: [\n", "not YAML"),
        ("extends: mine.yaml\n", "extends itself"),
        ("extends: imagenet/resnet50-dense\naugment: {cutout: 4}\n", "must be 0 for image folders"),
        ("extends: imagenet/resnet50-dense\naugment: {pad_crop: 2}\n", "must be 0 for image folders"),
        ("extends: imagenet/resnet50-dense\nresolution: {test: 250}\n", "resolution.test must be a positive multiple"),
        ("extends: imagenet/resnet50-dense\nresolution: {ramp_end: 65}\n", "ramp_start must be below ramp_end"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(raised.value)


def test_a_file_does_not_hide_the_built_in_recipe_of_its_name(tmp_path: Path, monkeypatch):
    (tmp_path / "digits").write_text("extends: digits\nlr: 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits").lr != load_recipe(tmp_path / "digits").lr == 0.5


def test_unknown_recipe_suggests_a_near_one():
    with pytest.raises(FileNotFoundError, match="did you mean 'cifar10/rescale-2-4'"):
        load_recipe("cifar10/rescale-24")


@pytest.mark.parametrize("assignment", ["lr", "=1"])
def test_bad_override_syntax(assignment):
    with pytest.raises(ValueError, match="must look like key=value"):
        parse_overrides([assignment])
