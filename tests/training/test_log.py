"""What a run shows and writes, and where it shows nothing."""

import csv
import io
import sys

from rich.console import Console

from sdgp_accel.training import log as log_module
from sdgp_accel.training.log import Log

ROWS = [
    {"epoch": epoch, "loss": 1.5 / epoch, "accuracy": 40.0 + epoch, "lr": 0.1 * epoch, "seconds": 2.0}
    for epoch in (1, 2)
]


def on_terminal(log):
    """`log`, as if it wrote to a terminal."""
    log.console.file = io.StringIO()
    log.console._force_terminal = True
    return log


def test_an_epoch_is_said_written_and_sent_to_tensorboard(tmp_path, monkeypatch, capsys):
    class Board:
        def __init__(self):
            self.scalars, self.closed = [], False

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            pass

        def close(self):
            self.closed = True

    monkeypatch.setattr(log_module, "_summary_writer", lambda folder: Board())
    with Log(tmp_path / "new" / "folder", main=True) as log:
        log.epoch(ROWS, epochs=3)
    assert log.board.scalars == [("loss", 0.75, 2), ("accuracy", 42.0, 2), ("lr", 0.2, 2)]
    assert log.board.closed
    assert capsys.readouterr().err == "epoch 2/3  loss 0.7500  test accuracy 42.00 %  lr 0.2  2.0 s\n"
    written = list(csv.DictReader((tmp_path / "new" / "folder" / "log.csv").open()))
    assert [{name: float(value) for name, value in row.items()} for row in written] == ROWS
    assert [path.name for path in log.output_dir.iterdir()] == ["log.csv"]


def test_only_the_main_process_shows_or_writes_anything(tmp_path, capsys):
    with Log(tmp_path / "of_the_others", main=False) as log:
        on_terminal(log)
        log.say("hello")
        log.epoch(ROWS, epochs=3)
        assert list(log.bar(range(3), "epoch 1/3", 3)) == [0, 1, 2]
    assert log.console.file.getvalue() == capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_a_bar_goes_on_where_a_resumed_epoch_does(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with Log(tmp_path, main=True) as log:
        log.console = Console(file=io.StringIO(), force_terminal=True, width=80)
        bar = log.bar(range(3, 6), "epoch 1/3", total=6, done=3)
        assert list(bar) == [3, 4, 5]
    shown = log.console.file.getvalue()
    assert "epoch 1/3" in shown
    assert "3/6" in shown
    assert "6/6" in shown
    assert not list(tmp_path.iterdir())
