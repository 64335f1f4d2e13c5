"""Two processes under torchrun over Gloo: they agree, they split the data, and they resume bit for bit."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sdgp_accel.training import distributed
from sdgp_accel.training.distributed import World, join_world
from sdgp_accel.training.loop import WEIGHTS

WORKER = Path(__file__).parent / "two_processes.py"


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*launcher, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: the launcher has to end its workers
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_a_process_takes_the_gpu_of_its_place_on_the_machine(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in (None, "cuda"):
        with join_world(device) as world:
            assert (world.rank, world.size, world.device) == (0, 1, torch.device("cuda", 3))
    assert current == [torch.device("cuda", 3)] * 2
    with join_world("cpu") as world:
        assert world.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be 'cpu' or None"), join_world("cuda"):
        pass


def test_shared_buffers_are_the_main_processes(monkeypatch):
    """BatchNorm's running mean and variance, and how many batches it has seen."""
    main, other, alone = (nn.BatchNorm1d(2) for _ in range(3))
    main(torch.randn(8, 2))
    sent = iter(list(main.buffers()))
    monkeypatch.setattr(dist, "broadcast", lambda buffer, src: buffer.copy_(next(sent)) if src == 0 else None)
    World(0, 1, torch.device("cpu")).share_buffers(alone)
    World(1, 2, torch.device("cpu")).share_buffers(other)
    assert all(map(torch.equal, other.buffers(), main.buffers()))
    assert alone.num_batches_tracked == 0


def test_sums_and_gathered_values_are_of_all_processes_and_the_first_one_is_the_main_one(monkeypatch):
    cpu = torch.device("cpu")
    alone, main, other = World(0, 1, cpu), World(0, 2, cpu), World(1, 2, cpu)
    assert [world.is_main for world in (alone, main, other)] == [True, True, False]
    assert alone.gather("a") == ["a"]
    assert alone.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]

    def gather(value, values):
        if values is not None:
            assert len(values) == 2
            values[:] = [value, "b"]

    monkeypatch.setattr(dist, "gather_object", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(10.0))
    assert main.gather("a") == ["a", "b"]
    assert other.gather("b") == []
    tensor = torch.tensor([1.0, 2.0])
    assert main.sum(tensor) is tensor
    assert tensor.tolist() == [11.0, 12.0]


def test_only_several_processes_wrap_the_model(monkeypatch):
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, device_ids: (model, device_ids))
    model, gpu = nn.Linear(2, 2), torch.device("cuda", 1)
    assert World(0, 1, gpu).parallel(model) is model
    assert World(0, 2, torch.device("cpu")).parallel(model) == (model, None)
    assert World(1, 2, gpu).parallel(model) == (model, [gpu])


@pytest.mark.parametrize("exists", [False, True])
def test_processes_leave_together_and_end_the_group_that_they_made(exists, monkeypatch):
    calls = []
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *arguments, name=name: calls.append((name, *arguments)))
    monkeypatch.setattr(dist, "is_initialized", lambda: exists)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("RANK", "1")
    made, ended = ([], []) if exists else ([("init_process_group", "gloo")], [("destroy_process_group",)])
    with join_world("cpu") as world:
        assert (world.rank, world.size) == (1, 2)
        assert calls == made
    assert calls == [*made, ("barrier",), *ended]
    calls.clear()
    with pytest.raises(InterruptedError), join_world("cpu"):  # the others may never come
        raise InterruptedError
    assert calls == [*made, *ended]


@pytest.mark.parametrize("function", ["rescale_magnitude", "mvue"])
def test_two_processes(function, tmp_path):
    finished = torchrun(str(WORKER), function, str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    whole, parts = (torch.load(tmp_path / name / WEIGHTS, weights_only=True) for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "parts")]
    assert len(logs[0]) == len(logs[1]) == 3
    for whole_row, parts_row in zip(*logs, strict=True):
        assert float(parts_row["loss"]) == pytest.approx(float(whole_row["loss"]), rel=1e-12)
    # Both ranks print what they got; the log lines are the main process's alone.
    accuracies = [line for line in finished.stdout.splitlines() if line.startswith("accuracy")]
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0].split()[1]) > 80
    assert finished.stderr.count("epoch 3/3") == 2  # of the whole and of the resumed run


def test_command_line_under_torchrun(tmp_path):
    overrides = ["--set", "epochs=2", "--set", "lr_peak_epoch=1", "--function", "dense"]
    finished = torchrun("-m", "sdgp_accel", "train", "digits", "--output-dir", str(tmp_path), *overrides)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("epoch 2/2") == 1
    assert "for batches of 1 x 64 images; these are of 2 x 64" in finished.stderr
    assert finished.stderr.count("test accuracy: ") == 1
