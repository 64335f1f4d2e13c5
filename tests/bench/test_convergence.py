"""The convergence harness at toy size on a CPU: it trains, resumes, stops on time and reports."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from bench import convergence
from bench.learning import summary
from bench.learning.cells import DENSE, OTHER_PATTERNS, Cell, by_value
from bench.learning.tasks import TASKS
from sdgp_accel import SDGPConv2d

TINY = {
    "transformer": replace(
        TASKS["transformer"],
        options={"layers": 1, "width": 32, "heads": 2, "context": 32},
        steps=4,
        batch=4,
        window=32,
        evaluations=2,
    ),
    "conv_lm": replace(
        TASKS["conv_lm"], options={"width": 32, "layers": 2}, steps=4, batch=4, window=32, evaluations=2
    ),
    "digits": replace(TASKS["digits"], steps=4, evaluations=2),
}


@pytest.fixture
def tiny(monkeypatch):
    """Tasks of a few steps, run in this process instead of in a pool."""
    monkeypatch.setattr(convergence, "TASKS", TINY)
    monkeypatch.setattr(summary, "TASKS", TINY)
    monkeypatch.setattr(convergence.concurrent.futures, "ProcessPoolExecutor", InProcess)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    convergence.use_pruning("package")


class InProcess:
    """The executor's interface without its processes."""

    def __init__(self, jobs, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = convergence.concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def run(lines, *arguments):
    result = CliRunner().invoke(convergence.main, ["run", "--lines", str(lines), "--device", "cpu", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_matrix_has_every_cell_once_and_the_telling_ones_first():
    cells = by_value()
    assert len(cells) == len(set(cells)) == 1 + 4 + 4 * 3 * (1 + len(OTHER_PATTERNS))
    assert cells[:3] == [DENSE, Cell("mvue", "both", 2, 4), Cell("rescale_magnitude", "both", 2, 4)]
    for cell in cells[1:]:
        config = cell.config()
        assert (config.grad_input == "sparse") == (cell.pruned in ("grad_input", "both"))
        assert (config.grad_weight == "sparse") == (cell.pruned in ("grad_weight", "both"))


def test_runs_are_resumed_and_reported(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    assert "12 runs to do" in run(lines, "--seeds", "2", "--cells", "2")
    written = lines.read_text()
    first, *_ = results = [json.loads(line) for line in written.splitlines()]
    assert len(results) == 12
    assert [point["step"] for point in first["curve"]] == [2, 4]
    assert first["environment"]["torch"] == torch.__version__

    assert "0 runs to do" in run(lines, "--seeds", "2", "--cells", "2")
    assert lines.read_text() == written

    lines.write_text(written[:-30])  # a crash while writing
    assert "1 runs to do" in run(lines, "--seeds", "2", "--cells", "2")
    assert len(lines.read_text().splitlines()) == 12

    report = CliRunner().invoke(convergence.main, ["report", "--lines", str(lines), "--out", str(tmp_path)])
    assert report.exit_code == 0, report.output
    assert {path.name for path in tmp_path.iterdir()} >= {"convergence.json", "convergence.md", "convergence.png"}
    cells = json.loads((tmp_path / "convergence.json").read_text())["tasks"]["digits"]["cells"]
    assert [(cell["cell"], cell["seeds"]) for cell in cells] == [("dense", 2), ("mvue 2:4 both", 2)]
    assert "| mvue |" in (tmp_path / "convergence.md").read_text()


def test_same_seed_means_same_start_and_same_batches_for_every_cell():
    device = torch.device("cpu")
    task = TINY["transformer"]
    data = task.data(device)
    dense, pruned = (convergence.training.Run(task, cell, 7, data, device) for cell in (DENSE, by_value()[1]))
    assert torch.equal(dense.batches, pruned.batches)
    for a, b in zip(dense.model.parameters(), pruned.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine_to_a_tenth():
    rates = convergence.training.learning_rates(replace(TINY["digits"], steps=104, warmup=4, lr=2.0))
    assert rates[:5].tolist() == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[[29, 54, 79]].tolist() == pytest.approx([0.2 + 0.9 * (1 + 0.5**0.5), 1.1, 0.2 + 0.9 * (1 - 0.5**0.5)])
    assert rates[-1].item() == pytest.approx(0.2, abs=1e-3)
    assert (rates[4:].diff() < 0).all()


def test_text_is_predicted_from_what_stands_before_and_validated_on_other_text():
    data = TINY["transformer"].data(torch.device("cpu"))
    last = len(data.train) - 33
    inputs, targets = data.gather(torch.tensor([0, last]))
    assert torch.equal(inputs[1], data.train[last : last + 32].long())
    assert torch.equal(targets[1], data.train[-32:].long())
    starts = data.draw(2000, 500, 0)
    assert 0 <= starts.min() < 100
    assert last - 100 < starts.max() <= last
    batches = data.validation()
    assert sum(len(batch.inputs) for batch in batches) == 512
    assert torch.equal(batches[0].inputs[0], data.held_out[:32].long())
    assert torch.equal(batches[-1].targets[-1], data.held_out[-32:].long())


def test_every_digit_is_drawn_once_an_epoch_and_a_fifth_of_them_never():
    data = TINY["digits"].data(torch.device("cpu"))
    (held_out,) = data.validation()
    count = len(data.labels) - len(held_out.targets)
    assert len(held_out.targets) == -(-len(data.labels) // 5)
    drawn = data.draw(2 * count, 1, 3).flatten()
    for epoch in drawn.split(count):
        assert torch.equal(epoch.sort().values, torch.arange(count))
    assert torch.equal(held_out.inputs, data.images[count:])
    assert data.images.max() == 1


def test_a_model_is_evaluated_as_it_is_used():
    class Always(torch.nn.Module):
        """Is sure that it sees a 3."""

        def forward(self, images):
            assert not self.training
            return 100.0 * torch.nn.functional.one_hot(torch.full((len(images),), 3), 10)

    data = TINY["digits"].data(torch.device("cpu"))
    run = convergence.training.Run(TINY["digits"], DENSE, 0, data, torch.device("cpu"))
    run.model = Always()
    (batch,) = data.validation()
    halves = [type(batch)(*parts) for parts in zip(*(tensor.tensor_split(2) for tensor in batch), strict=True)]
    share = (batch.targets == 3).double().mean().item()
    found = run.evaluate(halves)
    assert found["accuracy"] == pytest.approx(100 * share, abs=0.1)
    assert found["loss"] == pytest.approx(100 * (1 - share), abs=0.1)
    assert run.model.training


def test_scores_are_those_of_seeds_that_have_a_dense_run_on_the_device_with_most_of_them():
    task, pruned = TINY["digits"], Cell("mvue", "both", 2, 4)

    def line(cell, device, seed, score):
        curve = [{"step": 2, "accuracy": score / 2, "loss": 0.0}, {"step": 4, "accuracy": score, "loss": 0.0}]
        shared = {"task": "digits", "setup": task.setup(), "data_sha256": "0", "cell": vars(cell), "seed": seed}
        return shared | {"environment": {"device": device}, "final": curve[-1], "curve": curve}

    lines = [line(DENSE, "a", 0, 90.0), line(DENSE, "a", 1, 94.0), line(pruned, "a", 0, 89.0)]
    lines += [
        line(pruned, "a", 1, 91.0),
        line(pruned, "a", 2, 0.0),
        line(DENSE, "b", 0, 0.0),
        line(pruned, "b", 0, 1.0),
    ]
    lines += [line(DENSE, "c", 5, 50.0), line(pruned, "c", 6, 50.0)]
    entry = summary.summarise(task, lines)[pruned]
    assert (entry.device, entry.seeds, entry.mean, entry.delta) == ("a", 2, 90.0, -2.0)
    assert (entry.std, entry.delta_std) == pytest.approx((2**0.5, 2**0.5))
    assert entry.curve == [(2, 45.0), (4, 90.0)]
    one = summary.summarise(task, [line for line in lines if line["seed"] == 0])[pruned]
    assert (one.std, one.delta_std) == (0.0, 0.0)
    other = line(pruned, "a", 0, 0.0) | {"setup": "of other steps"}
    assert summary.summarise(task, [*lines, other])[pruned] == entry


def test_dense_head_is_left_alone():
    task = TINY["conv_lm"]
    cell = Cell("magnitude", "both", 2, 4, dense_head=True)
    run = convergence.training.Run(task, cell, 0, task.data(torch.device("cpu")), torch.device("cpu"))
    swapped = {name for name, module in run.model.named_modules() if isinstance(module, SDGPConv2d)}
    assert swapped == {"blocks.0.conv", "blocks.1.conv"}


def test_closed_time_box_leaves_nothing_half_done(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run(lines, "--cells", "1", "--minutes", "0")
    assert lines.read_text() == ""


def test_mixing_data_of_different_python_versions_is_refused(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run(lines, "--seeds", "1", "--cells", "1", "--task", "digits")
    line = json.loads(lines.read_text())
    other = line | {"data_sha256": "another"}
    with pytest.raises(ValueError, match="2 different data sets"):
        summary.summarise(TINY["digits"], [line, other])


def test_what_ran_on_a_device_is_compared_to_dense_runs_there(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run(lines, "--seeds", "1", "--cells", "2", "--task", "digits")
    results = map(json.loads, lines.read_text().splitlines())
    dense, pruned = sorted(results, key=lambda line: line["cell"]["function"])

    def elsewhere(line, gain, **cell):
        final = {name: value + gain for name, value in line["final"].items()}
        other = {"cell": line["cell"] | cell, "environment": line["environment"] | {"device": "a GPU"}, "final": final}
        return line | other

    results = [dense, pruned, elsewhere(dense, 10.0), elsewhere(pruned, 11.0, m=8)]
    entries = summary.summarise(TINY["digits"], results)
    here, there = entries[Cell("mvue", "both", 2, 4)], entries[Cell("mvue", "both", 2, 8)]
    assert there.delta == pytest.approx(here.delta + 1.0)
    assert {here.device, there.device} == {dense["environment"]["device"], "a GPU"}
    assert f"({there.delta:+.3f}) *" in summary.markdown(TINY["digits"], entries)
    # A run is not repeated here, but dense runs have to be from here.
    lines.write_text("".join(json.dumps(elsewhere(line, 0.0)) + "\n" for line in (dense, pruned)))
    assert "1 runs to do" in run(lines, "--seeds", "1", "--cells", "2", "--task", "digits")


def test_a_seed_that_diverged_is_named_so(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run(lines, "--seeds", "2", "--cells", "2", "--task", "digits")
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    lost = next(line for line in results if line["cell"]["function"] == "mvue")
    lost["final"] = dict.fromkeys(lost["final"], float("nan"))
    lines.write_text("".join(json.dumps(line) + "\n" for line in results))
    report = CliRunner().invoke(convergence.main, ["report", "--lines", str(lines), "--out", str(tmp_path)])
    assert report.exit_code == 0, report.output
    assert "| mvue | diverged |" in (tmp_path / "convergence.md").read_text()

    def no_nan(name):
        raise AssertionError(name)

    written = json.loads((tmp_path / "convergence.json").read_text(), parse_constant=no_nan)
    cells = {cell["cell"]: cell["mean"] for cell in written["tasks"]["digits"]["cells"]}
    assert cells["mvue 2:4 both"] is None
    assert cells["dense"] > 0.0
