"""The list of step-time cases: what is run, when it stops, what it returns."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import step_time
from sdgp_accel.cli import main


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands instead of processes; the model "digits" fails."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=int("digits" in command))

    monkeypatch.setattr(step_time.subprocess, "run", run)
    monkeypatch.setattr(step_time.torch.cuda, "is_available", lambda: False)
    return commands


def test_a_case_that_fails_leaves_the_others_standing(ran: list[list[str]], tmp_path: Path) -> None:
    assert step_time.main(["--out", str(tmp_path / "new")]) == 1
    assert len(ran) == len(step_time.CPU_CASES)
    assert (tmp_path / "new").is_dir()
    assert all(str(tmp_path / "new" / "step_time-") in " ".join(command) for command in ran)


def test_only_and_dry_run(ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(["--only", "resnet9", "--dry-run"]) == 0
    assert ran == []
    assert "sdgp_accel bench resnet9" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step_time.main(["--only", "nothing"])
    assert "no case nothing; there are digits" in capsys.readouterr().err


@pytest.mark.parametrize("case", [*step_time.GPU_CASES, *step_time.CPU_CASES], ids=lambda case: case.name)
def test_every_case_is_a_command_that_sdgp_understands(case: step_time.Case, tmp_path: Path) -> None:
    arguments = case.command(tmp_path)[3:]
    parsed = CliRunner().invoke(main, [*arguments, "--help"])  # options before --help are checked first
    assert parsed.exit_code == 0, parsed.output
    names = [case.name for case in step_time.GPU_CASES]
    assert len(set(names)) == len(names)
