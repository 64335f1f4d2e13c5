"""The training loop: it learns, it resumes bit for bit, and it says what is wrong."""

import csv
import itertools
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sdgp_accel import models
from sdgp_accel.config import SDGPConfig
from sdgp_accel.schedule import Schedule
from sdgp_accel.training import checkpoint, load_recipe, loop, train
from sdgp_accel.training.checkpoint import Progress
from sdgp_accel.training.distributed import World
from sdgp_accel.training.loop import CHECKPOINT, WEIGHTS
from sdgp_accel.training.schedule import learning_rate
from tests.training.crash import Interrupted, train_and_crash

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 22  # of an epoch of the digits


def short(function="dense", **changes):
    sdgp = None if function == "dense" else SDGPConfig(prune=function)
    return replace(load_recipe("digits"), epochs=3, lr_peak_epoch=1.0, sdgp=sdgp, **changes)


def resumes_bit_for_bit(recipe, tmp_path):
    """True if a run that crashes right after its second checkpoint goes on as if it had not."""
    train(recipe, tmp_path / "whole")
    train_and_crash(recipe, tmp_path / "parts", saves=2)
    # Whatever happens in between, and whatever state the resuming process starts from, must not matter.
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    train(recipe, tmp_path / "parts", resume=True)

    whole, parts = (torch.load(tmp_path / name / WEIGHTS, weights_only=True) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    different = [name for name in whole if not torch.equal(whole[name], parts[name])]
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "parts")]
    for log in logs:
        for row in log:
            row.pop("seconds")
    return not different and logs[0] == logs[1] and len(logs[0]) == recipe.epochs


@pytest.mark.parametrize("function", ["dense", "magnitude", "rescale_magnitude", "random", "mvue"])
def test_resume_after_an_epoch_is_bit_identical(function, tmp_path):
    assert resumes_bit_for_bit(short(function), tmp_path)


@pytest.mark.parametrize("checkpoint_steps", [8, STEPS // 2], ids=["in the middle", "on the last step"])
@pytest.mark.parametrize("function", ["dense", "random", "mvue"])
def test_resume_within_an_epoch_is_bit_identical(function, checkpoint_steps, tmp_path):
    assert resumes_bit_for_bit(short(function, checkpoint_steps=checkpoint_steps), tmp_path)


class DrawsFromEveryGenerator(nn.Module):
    """Noise from Python's, numpy's and torch's global generators on the way to the logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))

    def forward(self, images):
        noise = random.random() + np.random.random()  # noqa: NPY002
        return self.body(images + 0.1 * noise * self.training)


def test_resume_restores_every_generator_and_the_loss_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", lambda name, classes: DrawsFromEveryGenerator())
    assert resumes_bit_for_bit(short("mvue", amp="float16", checkpoint_steps=10), tmp_path)
    scaler = torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)["scaler"]
    assert scaler["_growth_tracker"] == 3 * STEPS


def test_resuming_a_finished_run_returns_its_result(tmp_path):
    first = train(short(), tmp_path)
    again = train(short(), tmp_path, resume=True)
    assert again.rows == first.rows
    assert again.accuracy == first.rows[-1]["accuracy"]


def test_workers_and_note_may_change_on_resume_but_nothing_else(tmp_path, capsys):
    train(short(), tmp_path)
    assert "the paper" not in capsys.readouterr().err
    train(short(workers=1, note="moved", checkpoint_steps=5, paper_top1=95.25), tmp_path, resume=True)
    assert "% (the paper: 95.2 %) after" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the one that wrote .*; that one has lr = 0.2, not 0.1, seed = 0, not 1"):
        train(short(lr=0.1, seed=1), tmp_path, resume=True)


def test_resume_with_another_number_of_processes(tmp_path):
    train(short(), tmp_path)
    model, _ = loop.build_model(short(), 10, ALONE.device)
    optimizer = loop.build_optimizer(short(), model)
    with pytest.raises(ValueError, match="goes on with 1 processes; got 2"):
        checkpoint.load(
            tmp_path / CHECKPOINT, World(0, 2, ALONE.device), short(), model, optimizer, torch.amp.GradScaler("cpu")
        )


def test_output_dir_in_use_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"resume needs a checkpoint; there is no .*{CHECKPOINT}"):
        train(short(), tmp_path, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"")
    with pytest.raises(ValueError, match="output_dir must be new, or pass resume"):
        train(short(), tmp_path)


def test_checkpoint_of_another_format(tmp_path):
    torch.save({"format": 0}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="must be a checkpoint of format 1"):
        train(short(), tmp_path, resume=True)


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    model, _ = loop.build_model(short(), 10, ALONE.device)
    optimizer, scaler = loop.build_optimizer(short(), model), torch.amp.GradScaler("cpu", enabled=False)
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, ALONE, short(), Progress(epoch=1), model, optimizer, scaler)

    def interrupted(source, target):
        raise Interrupted

    with monkeypatch.context() as there:
        there.setattr(os, "replace", interrupted)
        with pytest.raises(Interrupted):
            checkpoint.save(path, ALONE, short(), Progress(epoch=2), model, optimizer, scaler)
    assert checkpoint.load(path, ALONE, short(), model, optimizer, scaler) == Progress(epoch=1)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that goes down may leave the name of an empty file."""
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda source, target: sizes.append(source.stat().st_size))
    checkpoint.write({"a": torch.zeros(10_001)}, tmp_path / CHECKPOINT)
    assert sizes[0] == sizes[1] > 40_000


def test_a_full_disk_is_called_one(tmp_path):
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write({"a": torch.zeros(100_000)}, tmp_path / CHECKPOINT)


def test_weights_are_written_all_or_nothing(tmp_path, monkeypatch):
    replaced = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: replaced.append(paths[1].name) or replace_file(*paths))
    train(replace(short(), epochs=1, lr_peak_epoch=0.5), tmp_path)
    assert replaced[-1] == WEIGHTS


def test_the_time_before_a_resume_counts(tmp_path, monkeypatch):
    """A clock that goes on by a second with every look at it."""
    now = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    recipe = replace(short(checkpoint_steps=8), epochs=2)
    whole = train(recipe, tmp_path / "whole")
    assert [row["seconds"] for row in whole.rows] == [3.0, 3.0]
    assert whole.seconds == 6.0
    train_and_crash(recipe, tmp_path / "parts", saves=2)
    assert torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)["progress"]["step"] == 16
    parts = train(recipe, tmp_path / "parts", resume=True)
    assert [row["seconds"] for row in parts.rows] == [3.0, 3.0]
    assert parts.seconds == 6.0


def test_global_settings_are_put_back():
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    with loop.global_state(short(threads=before[0] + 1, deterministic=True), 0):
        assert torch.get_num_threads() == before[0] + 1
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    with loop.global_state(short(threads=None), 0):
        assert torch.get_num_threads() == before[0]
        assert torch.backends.cudnn.benchmark
    assert before == (
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def test_ranks_have_generators_of_their_own():
    """A model's dropout differs between processes."""
    drawn = []
    for rank in (0, 1, 0):
        with loop.global_state(short(), rank):
            drawn.append((torch.rand(()).item(), np.random.random(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_divergence_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="in epoch 1: training has diverged"):
        train(short(lr=1e30), tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_learning_rate_is_set_for_each_step(tmp_path):
    rows = train(short(), tmp_path).rows
    assert [row["lr"] for row in rows] == [
        pytest.approx(learning_rate(short(), epoch + (STEPS - 1) / STEPS)) for epoch in range(3)
    ]


def test_only_batchnorm_escapes_weight_decay():
    recipe = short(weight_decay=0.25, momentum=0.75)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10)))
    decayed, undecayed = loop.build_optimizer(recipe, model).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.25, 0)
    assert decayed["momentum"] == undecayed["momentum"] == 0.75
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert {id(p) for p in undecayed["params"]} == {ids[n] for n in ("1.weight", "1.bias", "2.1.weight", "2.1.bias")}
    assert {id(p) for p in decayed["params"]} == {ids[n] for n in ("0.weight", "0.bias", "2.0.weight", "2.0.bias")}


def test_the_loss_is_smoothed_as_the_recipe_says(tmp_path):
    losses = []
    for smoothing in (0.0, 1.0):
        recipe = replace(short(lr=0.0, label_smoothing=smoothing), epochs=1, lr_peak_epoch=0.5)
        losses.append(train(recipe, tmp_path / str(smoothing)).rows[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("amp", "dtype"), [("none", None), ("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_autocast_is_to_the_recipes_dtype(amp, dtype):
    with loop.autocast(short(amp=amp), ALONE.device):
        assert (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None) == dtype


def test_the_model_has_the_classes_of_the_data_and_the_layout_of_the_recipe():
    for channels_last in (False, True):
        model, _ = loop.build_model(short(channels_last=channels_last), 7, ALONE.device)
        assert model.head.out_features == 7
        weight = model.features[1][0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


class Fixed:
    """Test data in two batches."""

    def __init__(self):
        self.images, self.labels = torch.randn(50, 1, 4, 4), torch.randint(10, (50,))

    def test(self):
        yield self.images[:30], self.labels[:30]
        yield self.images[30:], self.labels[30:]


@pytest.mark.parametrize("flip", [False, True])
def test_accuracy_with_and_without_mirror_images(flip):
    data, model = Fixed(), nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    correct = 0
    for image, label in zip(data.images, data.labels, strict=True):
        logits = model(image[None])[0]
        if flip:
            logits = (logits + model(image.flip(2)[None])[0]) / 2
        correct += int(logits.argmax() == label)
    assert loop.test(short(test_flip=flip), ALONE, model, data) == pytest.approx(100 * correct / 50)


def test_every_process_tests_with_the_buffers_of_the_main_one():
    """BatchNorm's statistics, which differ after the last step: else each tests a model of its own."""

    class Second(World):
        def share_buffers(self, model):
            model[2].running_mean.copy_(shared)

    data, model = Fixed(), nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10))
    shared = 100 * torch.nn.functional.one_hot(torch.tensor(3), 10)  # subtracted: 3 is the last to be chosen
    data.labels.fill_(3)
    assert loop.test(short(), Second(0, 1, ALONE.device), model, data) == 0
    shared = -shared
    assert loop.test(short(), Second(0, 1, ALONE.device), model, data) == 100


def test_only_convolutions_are_swapped_where_the_recipe_says_so():
    everything, _ = loop.build_model(short("mvue"), 10, ALONE.device)
    convolutions, report = loop.build_model(short("mvue", sdgp_layers="conv2d"), 10, ALONE.device)
    assert type(everything.head).__name__ == "SDGPLinear"
    assert type(convolutions.head) is nn.Linear
    assert len(report) == sum(type(module).__name__ == "SDGPConv2d" for module in convolutions.modules()) == 2
    text = loop.describe(short("mvue"), ALONE, report)
    assert text == "digits on digits, mvue 2:4 (layers: 2 dense, 2 reference); 1 x cpu, 3 epochs"


@pytest.mark.parametrize("function", ["dense", "mvue"])
def test_digits_reach_97_percent(function, tmp_path):
    recipe = load_recipe("digits")
    result = train(recipe if function == "mvue" else replace(recipe, sdgp=None), tmp_path)
    assert recipe.sdgp.functions == ("mvue", "mvue")
    assert result.accuracy > 97
    assert result.seconds < 120


def test_image_folder_recipe_end_to_end(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for i in range(count):
            folder = tmp_path / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (48, 48, 3)) + 150 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    overrides = {
        "epochs": 2,
        "lr_peak_epoch": 1,
        "lr": 0.01,
        "batch_size": 8,
        "workers": 0,
        "amp": "bfloat16",
        "resolution": {"start": 32, "end": 64, "ramp_start": 0, "ramp_end": 1, "test": 64},
    }
    result = train(load_recipe("imagenet/resnet18-rescale-2-4", overrides), tmp_path / "out", tmp_path)
    assert len(result.rows) == 2
    assert np.isfinite(result.rows[-1]["loss"])
    assert any(name.endswith("conv1.1.weight") for name in torch.load(tmp_path / "out" / WEIGHTS, weights_only=True))


@pytest.mark.parametrize(
    "schedule", [Schedule(end=0.5), Schedule(end=1.5, unit="epochs"), Schedule(end=33, unit="steps")], ids=str
)
def test_a_schedule_counts_the_whole_run(schedule, monkeypatch):
    said, recipe = [], short(sdgp_schedule=schedule)  # 3 epochs of 22 steps
    log = SimpleNamespace(say=said.append)
    monkeypatch.setattr(loop, "set_active_", lambda model, active: said.append(active))
    for step, active in ((10, True), (11, False)):
        assert loop.follow_schedule(recipe, Progress(epoch=1, step=step), STEPS, None, True, log) is active
    assert said == [False, "dense from epoch 2.5 on"]


def test_a_schedule_ends_pruning_and_survives_a_resume(tmp_path, monkeypatch):
    switched = []
    switch = loop.set_active_
    monkeypatch.setattr(loop, "set_active_", lambda model, active: switched.append(active) or switch(model, active))
    recipe = short("magnitude", sdgp_schedule=Schedule(start=1, end=50, unit="steps"), checkpoint_steps=15)
    assert resumes_bit_for_bit(recipe, tmp_path)
    # The whole run: off before the first step, on, off. The interrupted one: off, on until it crashed in the second
    # epoch (a checkpoint after 15 steps and one after the epoch); resumed at its start: already on, off at step 50.
    assert switched == [False, True, False, False, True, False]


def test_a_dense_recipe_ignores_the_schedule(tmp_path):
    train(short(sdgp_schedule=Schedule(end=0.5)), tmp_path / "dense")
