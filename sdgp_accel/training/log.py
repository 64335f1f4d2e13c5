"""What a run shows and writes: a progress bar, a line for each epoch, ``log.csv`` and TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Log:
    """The log of one process; only the `main` one shows or writes anything. Bars appear on terminals only."""

    def __init__(self, output_dir: Path, main: bool) -> None:
        if main:  # under torchrun the others may call their folder by another second
            output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.main = output_dir, main
        self.console = Console(stderr=True, quiet=not main)
        self.board = _summary_writer(output_dir) if main else None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """Print `text`."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def bar(self, items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
        """Pass `items` on, under a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(label, total=total, completed=done)
            for item in items:
                yield item
                progress.advance(task)

    def epoch(self, rows: list[dict[str, float]], epochs: int) -> None:
        """Show and write the last of `rows`, the rows of all epochs so far."""
        if not self.main:
            return
        row = rows[-1]
        self.say(
            f"epoch {row['epoch']:.0f}/{epochs}  loss {row['loss']:.4f}  test accuracy {row['accuracy']:.2f} %  "
            f"lr {row['lr']:.4g}  {row['seconds']:.1f} s"
        )
        # Written whole each time: after a resume the file must not hold epochs that are computed again.
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row))
        writer.writeheader()
        writer.writerows(rows)
        unfinished = self.output_dir / "log.csv.tmp"
        unfinished.write_text(text.getvalue(), encoding="utf-8")
        os.replace(unfinished, self.output_dir / "log.csv")
        if self.board is not None:
            for name in ("loss", "accuracy", "lr"):
                self.board.add_scalar(name, row[name], int(row["epoch"]))
            self.board.flush()


def _summary_writer(output_dir: Path) -> Any:
    """TensorBoard's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(output_dir))
