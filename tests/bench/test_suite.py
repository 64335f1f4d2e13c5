"""The suite with a made-up GPU: real processes for small cases, pretended time for the list."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from bench import suite
from bench.suite import Case, Machine, Outcome, Run
from bench.tables.checks import CHECKS

MACHINE = Machine("Made-up GPU", "90a", {"gpu": {"name": "Made-up GPU"}})
BUILD = Case("build", "{python} -c pass", 10)


@pytest.fixture(autouse=True)
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.build_kernels, "is_current", lambda extension, archs: False)


class Time:
    """Cases take what `takes` says, in this clock's seconds; "fails" and "hangs" do what they are called."""

    def __init__(self, **takes: float) -> None:
        self.seconds, self.takes, self.ran = 0.0, takes, []

    def now(self) -> float:
        return self.seconds

    def execute(self, case: Case, limit: float) -> int | None:
        self.ran.append(case.name)
        took = self.takes.get(case.name, case.seconds)
        self.seconds += min(took, limit)
        return None if took > limit else int(case.name == "fails")


def run_of(tmp_path: Path) -> Run:
    return Run(MACHINE, "0123456789abcdef", tmp_path)


def outcomes(cases: list[Case], run: Run, clock: Time, minutes: float, **done: Any) -> dict[str, Outcome]:
    found = suite.outcomes(cases, run, minutes, done, False, clock.execute, clock.now)
    return {case.name: outcome for case, outcome in found}


def test_valuable_cases_first_and_none_that_cannot_end_in_time(tmp_path: Path) -> None:
    cases = [Case("a", "a", 50), Case("long", "b", 60), Case("short", "c", 40), Case("late", "d", 40)]
    clock = Time(a=55)
    found = outcomes(cases, run_of(tmp_path), clock, minutes=100 / 60)
    assert clock.ran == ["a", "short"]
    assert found["a"] == Outcome("passed", 55)
    assert found["long"] == Outcome("left out", reason="takes about 60 s, 45 s are left")
    assert found["late"].status == "left out"
    assert clock.seconds <= 100


def test_overruns_are_killed_at_the_end_of_the_time_or_at_a_multiple_of_the_estimate(tmp_path: Path) -> None:
    cases = [Case("hangs", "a", 10), Case("next", "b", 10)]
    clock = Time(hangs=1e9)
    assert outcomes(cases, run_of(tmp_path), clock, float("inf"))["hangs"].status == "killed"
    assert clock.ran == ["hangs", "next"]
    assert clock.seconds == suite.SLACK * 10 + suite.SLACK_SECONDS + 10
    clock = Time(hangs=1e9)
    found = outcomes(cases, run_of(tmp_path), clock, minutes=0.5)
    assert (clock.seconds, found["next"].status) == (30, "left out")


def test_a_failure_stops_nothing_but_the_builds_does(tmp_path: Path) -> None:
    cases = [BUILD, Case("fails", "a", 1), Case("next", "b", 1)]
    found = outcomes(cases, run_of(tmp_path), Time(), float("inf"))
    assert [outcome.status for outcome in found.values()] == ["passed", "failed", "passed"]
    clock = Time()
    clock.execute = lambda case, limit: 1  # type: ignore[method-assign]
    found = outcomes(cases, run_of(tmp_path), clock, float("inf"))
    assert [outcome.reason for outcome in found.values()] == ["exit code 1", "the build failed", "the build failed"]
    clock = Time(build=1e9)
    found = outcomes(cases, run_of(tmp_path), clock, float("inf"))
    assert [outcome.status for outcome in found.values()] == ["killed", "skipped", "skipped"]
    assert found["next"].reason == "the build was killed"
    assert clock.ran == ["build"]


def test_nothing_runs_without_a_build_but_one_that_is_there_takes_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, run = [BUILD, Case("next", "b", 1)], run_of(tmp_path)
    found = outcomes(cases, run, Time(), minutes=0.1)
    assert [outcome.status for outcome in found.values()] == ["left out", "skipped"]
    assert found["next"].reason == "the kernels are not built"
    monkeypatch.setattr(suite.build_kernels, "is_current", lambda extension, archs: archs == ("90a",))
    found = outcomes(cases, run, Time(build=1), minutes=0.1)
    assert [outcome.status for outcome in found.values()] == ["passed", "passed"]


def test_what_is_done_is_not_repeated_unless_its_result_is_gone(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    cases = [BUILD, Case("test", "x", 1), Case("kept", "{result}", 1), Case("gone", "{result}", 1)]
    run.folder.mkdir()
    kept = run.result(cases[2])
    assert kept is not None
    kept.write_text("{}")
    done = {name: {"status": "passed"} for name in ("build", "test", "kept", "gone")}
    clock = Time()
    found = outcomes(cases, run, clock, float("inf"), **done)
    assert clock.ran == ["build", "gone"]  # the build itself knows what is current
    assert found["kept"] == Outcome("skipped", reason=suite.DONE)
    assert outcomes(cases, run, Time(), float("inf"), kept={"status": "failed"})["kept"].status == "passed"
    again = suite.outcomes(cases, run, 60, done, True, clock.execute, clock.now)
    assert [outcome.status for _, outcome in again] == ["passed"] * 4


def test_missing_modules_and_programs_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "find_sanitizer", lambda: None)
    cases = [Case("a", "x", 1, ("torch", "no_such_module")), suite.sanitize("memcheck", "b", "tests", 1)]
    cases += [Case("other", "x", 1, arch="80"), Case("ours", "x", 1, arch="90a")]
    found = outcomes(cases, run_of(tmp_path), Time(), float("inf"))
    assert found["a"].reason == "no_such_module not installed"
    assert (found["other"].reason, found["ours"].status) == ("for sm_80 only", "passed")
    assert found["memcheck-b"].reason == "no compute-sanitizer on the PATH or in the CUDA toolkit"


def test_estimates_come_from_the_last_run_on_the_same_gpu(tmp_path: Path) -> None:
    run, case = run_of(tmp_path), Case("a", "x", 100)
    assert run.estimate(case) == 100
    for age, (sources, status, seconds) in enumerate(
        [("new", "killed", 9), ("old", "passed", 70), ("older", "passed", 5)]
    ):
        path = run._replace(sources=sources).record_path
        path.parent.mkdir()
        entry = {"status": status, "seconds": seconds}
        path.write_text(json.dumps({"cases": {"a": entry, "build": entry}}))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert run.estimate(case) == 70
    assert run.estimate(BUILD) == BUILD.seconds
    limits: list[float] = []
    list(suite.outcomes([case], run, 60, {}, False, lambda case, limit: limits.append(limit) or 0, lambda: 0.0))
    assert limits == [suite.SLACK * 100 + suite.SLACK_SECONDS]
    assert run._replace(machine=MACHINE._replace(gpu="Another")).estimate(case) == 100


def test_the_digest_is_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    sources = [tmp_path / name for name in ("bench/deep/a.py", "cutlass_ops/a.cuh", "tests/a.py", "sdgp_accel/a.yaml")]
    for source in sources:
        source.parent.mkdir(parents=True)
        source.write_text("one")
    seen = {suite.source_digest(MACHINE)}
    (tmp_path / "bench" / "result.json").write_text("{}")
    assert suite.source_digest(MACHINE) in seen
    for source in sources:
        source.write_text("two")
        seen.add(suite.source_digest(MACHINE))
    assert len(seen) == 1 + len(sources)
    source.rename(source.with_name("b.yaml"))
    assert suite.source_digest(MACHINE) not in seen


def test_another_torch_or_driver_repeats_everything() -> None:
    def digest(torch: str, driver: str) -> str:
        gpu = {"name": "Made-up GPU", "state": {"driver_version": driver, "power.draw": os.urandom(4).hex()}}
        return suite.source_digest(MACHINE._replace(origin={"versions": {"torch": torch}, "gpu": gpu}))

    assert digest("2.6", "580") == digest("2.6", "580")
    assert len({digest("2.6", "580"), digest("2.9", "580"), digest("2.6", "590")}) == 3


def test_a_process_that_overruns_ends_with_all_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    assert suite.execute([sys.executable, "-c", program], tmp_path / "log", 8.0, dict(os.environ)) is None
    child = int((tmp_path / "log").read_text())
    stat = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)  # an orphan that nobody waits for may stay as a zombie
    assert not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z"


def test_an_interrupted_suite_stops_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    program = (
        "from pathlib import Path; from bench import suite;"
        "suite.find_machine = lambda: suite.Machine('Made-up GPU', '90a', {});"
        f"suite.CASES = (suite.Case('build', '{{python}} {child}', 100),);"
        f"suite.main(['--out', '{tmp_path / 'out'}'])"
    )
    environment = os.environ | {"PYTHONPATH": str(suite.ROOT), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300  # for importing torch on a busy machine
    logs: list[Path] = []
    while not (logs and logs[0].read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
        logs = list(tmp_path.glob("out/*/build.log"))
    running.terminate()
    running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(logs[0].read_text()), 0)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Five small real cases on the made-up GPU; what they write can be counted."""
    write = tmp_path / "write.py"
    write.write_text("import sys, pathlib; path = pathlib.Path(sys.argv[1]); path.write_text('{\"rows\": []}')")
    fail = tmp_path / "fail.py"
    fail.write_text(
        "import os; print('path', os.environ['PYTHONPATH']); print('archs', os.environ['SDGP_CUDA_ARCHS']);"
        "raise SystemExit('went wrong')"
    )
    cases = (
        BUILD,
        Case("one", f"{{python}} {write} {{result}}", 5),
        Case("fails", f"{{python}} {fail} {{result}}", 5),
        Case("two", f"{{python}} {write} {{result}}", 5),
        Case("endless", f"{{python}} {write} {{result}}", 1e6),
    )
    monkeypatch.setattr(suite, "CASES", cases)
    monkeypatch.setattr(suite, "find_machine", lambda: MACHINE)
    monkeypatch.setattr(suite, "state_of_gpu", lambda: {"power.draw": "1 W"})
    handler = suite.signal.getsignal(suite.signal.SIGTERM)
    yield tmp_path / "out"
    suite.signal.signal(suite.signal.SIGTERM, handler)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(suite.main, list(map(str, arguments)))


def test_the_whole_path(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "users_own")
    result = call("--out", small, "--minutes", 10)
    assert result.exit_code == 1
    assert "not passed: fails; logs are in" in result.output
    assert f"    path {suite.ROOT}{os.pathsep}users_own\n    archs 90a\n    went wrong" in result.output
    (folder,) = small.iterdir()
    record = json.loads((folder / "suite-Made-up_GPU.json").read_text())
    assert record["provenance"] == MACHINE.origin
    assert {name: entry["status"] for name, entry in record["cases"].items()} == {
        "build": "passed", "one": "passed", "fails": "failed", "two": "passed", "endless": "left out",
    }  # fmt: skip
    one = record["cases"]["one"]
    assert (one["result"], one["log"], one["gpu"]) == ("one-Made-up_GPU.json", "one.log", {"power.draw": "1 W"})
    assert (folder / one["result"]).exists()
    assert record["cases"]["fails"]["result"] is None
    assert CHECKS.accepts(record)

    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        assert f"skipped: {suite.DONE}" in call("--out", small, "--dry-run").output
    resumed = call("--out", small, "--minutes", 10)
    assert f"one{'':23} skipped: {suite.DONE}" in resumed.output
    assert "fails" in resumed.output.split("not passed: ")[1]
    assert json.loads((folder / "suite-Made-up_GPU.json").read_text())["cases"]["one"] == one

    assert suite.DONE not in call("--out", small, "--minutes", 10, "--again", "--only", "one", "--only", "two").output


def test_what_ran_before_an_interruption_is_on_record(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = suite.execute

    def interrupted(command: list[str], log: Path, *arguments: Any) -> int | None:
        if log.stem == "two":
            raise KeyboardInterrupt
        return real(command, log, *arguments)

    monkeypatch.setattr(suite, "execute", interrupted)
    assert call("--out", small).exit_code == 1
    (path,) = small.glob("*/suite-*.json")
    ended = {name: case["status"] for name, case in json.loads(path.read_text())["cases"].items()}
    assert ended == {"build": "passed", "one": "passed", "fails": "failed"}


def test_a_repeated_case_that_is_interrupted_is_not_done(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("--out", small, "--minutes", 10)
    (path,) = small.glob("*/one-*.json")

    def interrupted(command: list[str], log: Path, *arguments: Any) -> int | None:
        if log.stem == "one":
            path.write_text("half of a result")
            raise KeyboardInterrupt
        return 0

    with monkeypatch.context() as there:
        there.setattr(suite, "execute", interrupted)
        assert call("--out", small, "--again", "--only", "one").exit_code == 1
    assert suite.DONE not in call("--out", small, "--only", "one").output
    assert json.loads(path.read_text()) == {"rows": []}


def test_a_repeated_case_that_fails_has_no_result(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("--out", small, "--minutes", 10)
    monkeypatch.setattr(suite, "execute", lambda command, log, *rest: log.write_text("out of memory") * 0 + 1)
    monkeypatch.setattr(suite, "CASES", suite.CASES[1:])  # without the build
    assert "not passed: two;" in call("--out", small, "--again", "--only", "two").output
    (path,) = small.glob("*/suite-*.json")
    record = json.loads(path.read_text())["cases"]
    assert [record[name]["result"] for name in ("one", "two")] == ["one-Made-up_GPU.json", None]
    assert not list(small.glob("*/two-*.json"))


def test_the_last_reason_for_leaving_a_case_out_is_on_record(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setattr(suite, "execute", lambda command, log, *rest: log.write_text("no compiler") * 0 + 1)
        call("--out", small)
    (path,) = small.glob("*/suite-*.json")
    assert json.loads(path.read_text())["cases"]["endless"]["reason"] == "the build failed"
    call("--out", small, "--minutes", 10)
    record = json.loads(path.read_text())["cases"]
    assert record["endless"]["reason"].startswith("takes about 1000000 s")
    call("--out", small, "--minutes", 0.1, "--again")
    left_out = json.loads(path.read_text())["cases"]
    assert [left_out[name] for name in ("one", "fails")] == [record[name] for name in ("one", "fails")]  # they have run


@pytest.mark.parametrize(
    ("printed", "status"), [("12 skipped in 3.1s", "failed"), ("1 passed, 11 skipped in 3s", "passed")]
)
def test_tests_that_are_all_skipped_have_not_passed(
    small: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: str
) -> None:
    """As those of the kernels are where the extension does not load."""
    monkeypatch.setattr(suite, "CASES", (BUILD, Case("tests", f"{suite.PYTEST} tests", 5)))
    monkeypatch.setattr(suite, "execute", lambda command, log, *rest: log.write_text(printed) * 0)
    call("--out", small)
    (path,) = small.glob("*/suite-*.json")
    assert {name: case["status"] for name, case in json.loads(path.read_text())["cases"].items()} == {
        "build": "passed", "tests": status,
    }  # fmt: skip


def test_a_benchmark_without_a_result_has_not_passed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "execute", lambda command, log, *rest: log.write_text("nothing to do") * 0)
    assert "not passed: one;" in call("--out", small, "--only", "one").output


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cases": []}', '{"cases": {"one": 3}}', "\\xff"])
def test_a_damaged_record_is_no_record(small: Path, content: str) -> None:
    call("--out", small, "--minutes", 10)
    (path,) = small.glob("*/suite-*.json")
    path.write_text(content)
    foreign = small / "other" / path.name
    foreign.parent.mkdir()
    foreign.write_text(content)
    assert call("--out", small, "--dry-run").exit_code == 0
    resumed = call("--out", small, "--minutes", 10)
    assert "is no record of this suite" in resumed.output
    assert suite.DONE not in resumed.output
    assert json.loads(path.read_text())["cases"]["two"]["status"] == "passed"


def test_a_time_that_is_none_is_refused(small: Path) -> None:
    for minutes in ("nan", "-1", "soon"):
        result = call("--out", small, "--minutes", minutes)
        assert result.exit_code == 2
        assert "--minutes" in result.output
    assert not small.exists()


def test_dry_run_runs_nothing(small: Path) -> None:
    result = call("--out", small, "--dry-run", "--minutes", 0.3)
    assert result.exit_code == 0, result.output
    assert not small.exists()
    lines = result.output.splitlines()
    assert lines[0].split() == ["build", "10", "s", "0.2", "min"]
    assert "left out: takes about 5 s, 3 s are left" in lines[4]


def test_it_starts_beside_an_extension_that_does_not_load(tmp_path: Path) -> None:
    for folder in suite.SOURCES:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(suite.ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "cutlass_ops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    command = [sys.executable, "-m", "bench.suite", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("build ")


def test_whatever_is_selected_is_built_first() -> None:
    assert [case.name for case in suite.select(["gemm", "over"])] == ["build", "gemm", "overhead", "gemm-sm80"]


def test_the_sanitizer_fails_where_it_finds_something() -> None:
    """By itself it ends as the tests do. Within torch's cached blocks it finds nothing."""
    cases = [case for case in suite.CASES if case.name.startswith(("memcheck", "racecheck"))]
    assert len(cases) == 6
    for case in cases:
        command = case.command.split()
        assert command[command.index("--tool") + 1] == case.name.split("-")[0]
        assert command.index("--error-exitcode") + 1 == command.index("1") < command.index("pytest")
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in command
        if "-k" in command:
            assert f"{command[-1]}(" in (suite.ROOT / command[-3]).read_text()


def test_unknown_names_are_refused(small: Path) -> None:
    result = call("--out", small, "--only", "three")
    assert result.exit_code == 2
    assert "no case starts with three; there are build, one," in " ".join(result.output.replace("│", "").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = call("--out", tmp_path)
    assert result.exit_code == 1
    assert "no CUDA device" in result.output


def test_eight_minutes_are_enough_for_something_useful(tmp_path: Path) -> None:
    """By the estimates: the build, the kernels' tests, and a layer's and a model's time."""
    run = run_of(tmp_path)
    found = suite.outcomes(suite.CASES, run, 8, {}, True, *suite.pretend(run))
    passed = [case.name for case, outcome in found if outcome.status == "passed"]
    assert len(set(passed)) == len(passed)
    assert set(passed) >= {"build", "tests-prune", "tests-sm90", "tests-sm80", "layers-mvue", "step_time-resnet9"}


@pytest.mark.parametrize("case", suite.CASES, ids=lambda case: case.name)
def test_every_case_is_a_command_that_exists(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    command = run_of(tmp_path).command(case)
    assert not any("{" in part for part in command)
    if command[1:3] == ["-m", "sdgp_accel"]:
        from sdgp_accel.cli import main

        parse(main, command[3:])
    elif command[1] == "-m" and command[2].startswith("bench."):
        parse(getattr(__import__(command[2], fromlist=["main"]), "main"), command[3:])  # noqa: B009
    else:
        paths = [part.removeprefix("--ignore=") for part in command]
        files = [path for path in paths if path.endswith(".py") or path.startswith("tests/")]
        assert files
        assert all((suite.ROOT / part).exists() for part in files)


def parse(command: click.Command, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, [*arguments, "--help"])  # what stands before --help is checked first
    assert result.exit_code == 0, result.output
