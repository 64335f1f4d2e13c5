"""One command for a GPU: build the kernels, test and sanitize them, and measure what the README reports.

    python -m bench.suite                            # everything; or `make gpu`
    python -m bench.suite --minutes 8                # the most valuable cases that fit
    python -m bench.suite --dry-run                  # what would run, with estimates; needs no GPU
    python -m bench.suite --only gemm --again        # the cases whose names start so, also where a result exists

Every case is a process of its own. Its log and its result go to runs/suite/<GPU>-<sources>/, where <sources> is a
digest of the code (so it works in a copy without git, and counts changes that are not committed) and of the versions of
torch, its libraries and the driver: with the same of all on the same GPU it finds its earlier results and does not
repeat them. suite-<GPU>.json there says what ran, how it ended, how long it took, and on what machine, driver and
versions. To put results into the README, copy them to bench/results/ and run `python -m bench.report`.

Needs torch and a CUDA GPU, no virtual environment and no network. The extension is built for this GPU alone, and not at
all where one in cutlass_ops/ has the stamp of these sources (`build_kernels.is_current`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from bench import step_time
from cutlass_ops import build_kernels
from sdgp_accel.backends.gpu import own_arch
from sdgp_accel.provenance import gpu_state, provenance

ROOT = Path(__file__).parent.parent
SOURCES = ("sdgp_accel", "cutlass_ops", "bench", "tests")
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".yaml")
SLACK, SLACK_SECONDS = 3.0, 60.0  # a case may take so many times its estimate, and so much more, before it is killed
BUILT_SECONDS = 2.0  # to see that nothing is to be built
GRACE_SECONDS = 5.0  # between asking a process to end and killing it
TAIL_LINES = 15
NOTHING: dict[str, Any] = {"cases": {}}  # the record of a suite that has not run
DONE = "done before, with these sources on this GPU"

PYTEST = "{python} -m pytest -q -p no:cacheprovider"
TESTING = ("pytest", "pytest_timeout")
PASSED = re.compile(r"\b[1-9]\d* passed\b")  # at the end of what pytest prints
NOTHING_DONE = 5  # the exit code of a case that has not worked: pytest's own where it finds no tests


class Case(NamedTuple):
    """One process.

    command: {python}, {sanitizer} and {result}, the file that a benchmark writes, are filled in. seconds: the estimate,
    for an H100 with 16 cores, until the case has run on a machine. needs: modules that it imports. arch: the only
    architecture it is for.
    """

    name: str
    command: str
    seconds: float
    needs: tuple[str, ...] = ()
    arch: str = ""


def step(name: str, seconds: float, *needs: str) -> Case:
    """A case of bench/step_time.py."""
    case = next(case for case in step_time.GPU_CASES if case.name == name)
    arguments = " ".join((case.model, *case.options))
    return Case(f"step_time-{name}", f"{{python}} -m sdgp_accel bench {arguments} --json {{result}}", seconds, needs)


def sanitize(tool: str, name: str, tests: str, seconds: float, arch: str = "") -> Case:
    """compute-sanitizer on a few small tests; only our kernels, whose names hold "sdgp", are instrumented.

    Each tensor has an allocation of its own: inside torch's large blocks no access is out of bounds.
    """
    command = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {{sanitizer}} --tool {tool} --kernel-name kns=sdgp"
    return Case(f"{tool}-{name}", f"{command} --error-exitcode 1 {PYTEST} {tests}", seconds, TESTING, arch)


PRUNE, SM90, SM80 = (f"tests/kernels/test_{name}.py" for name in ("prune_compress", "sm90_sparse", "sm80_sparse"))
OTHERS = f"tests/kernels --ignore={PRUNE} --ignore={SM90} --ignore={SM80}"
SMALL = f"{PRUNE} -k any_shape"

# Most valuable first: does it work, what does a layer and the smallest whole model gain, then the rest.
CASES = (
    Case("build", "{python} cutlass_ops/build_kernels.py", 90),
    Case("tests-prune", f"{PYTEST} {PRUNE}", 60, TESTING),
    Case("tests-sm90", f"{PYTEST} {SM90}", 30, TESTING, "90a"),
    Case("tests-sm80", f"{PYTEST} {SM80}", 30, TESTING),
    Case("layers-mvue", "{python} -m bench.layers --prune mvue --json {result}", 120),
    step("resnet9", 110),
    Case("kernels", "{python} -m bench.kernels --json {result}", 40),
    Case("gemm", "{python} -m bench.gemm --json {result}", 120),
    Case("tests-kernels", f"{PYTEST} {OTHERS}", 120, TESTING),
    Case("tests-layers", f"{PYTEST} tests/test_layers_cuda.py", 60, TESTING),
    step("vit_large", 240, "timm"),
    Case("overhead", "{python} -m bench.overhead --json {result}", 30),
    Case("layers-rescale_magnitude", "{python} -m bench.layers --prune rescale_magnitude --json {result}", 120),
    sanitize("memcheck", "prune", SMALL, 60),
    sanitize("memcheck", "sm90", SM90, 60, "90a"),
    sanitize("memcheck", "sm80", SM80, 60),
    step("gpt_block", 120),
    step("resnet50", 200, "torchvision"),
    step("resnet18", 120, "torchvision"),
    step("regnet_x_400mf", 180, "torchvision"),
    sanitize("racecheck", "prune", SMALL, 60),
    sanitize("racecheck", "sm90", SM90, 90, "90a"),
    sanitize("racecheck", "sm80", SM80, 90),
    Case("gemm-sm80", "{python} -m bench.gemm --family sm80 --json {result}", 120, arch="90a"),
    step("resnet9-paper", 110),
    step("gpt2_medium", 200),
    step("vit_base", 150, "timm"),
)


class Machine(NamedTuple):
    """The GPU as torch calls it, the architecture to build for, and where results come from."""

    gpu: str
    arch: str
    origin: dict[str, Any]


def find_machine() -> Machine:
    """This machine; ClickException without a GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device: there is nothing to run here; --dry-run works without one")
    arch = own_arch(torch.cuda.get_device_capability())
    return Machine(torch.cuda.get_device_name(), arch, provenance(torch.device("cuda")))


def state_of_gpu() -> dict[str, str]:
    """Clocks, power and temperature now."""
    return gpu_state(torch.device("cuda"))


class Run(NamedTuple):
    """Where one call of the suite works: on which machine, with which sources (a digest), under which folder."""

    machine: Machine
    sources: str
    out: Path

    @property
    def label(self) -> str:
        """The GPU in file names."""
        return self.machine.gpu.replace(" ", "_")

    @property
    def folder(self) -> Path:
        """Of this GPU and these sources."""
        return self.out / f"{self.label}-{self.sources[:12]}"

    @property
    def record_path(self) -> Path:
        """What ran, and how it ended."""
        return self.folder / f"suite-{self.label}.json"

    def result(self, case: Case) -> Path | None:
        """The file that the case writes, for those that do."""
        return self.folder / f"{case.name}-{self.label}.json" if "{result}" in case.command else None

    def log(self, case: Case) -> Path:
        """What the case has printed."""
        return self.folder / f"{case.name}.log"

    def command(self, case: Case) -> list[str]:
        """What to execute."""
        values = {"python": sys.executable, "result": self.result(case), "sanitizer": find_sanitizer()}
        return [part.format(**values) for part in case.command.split()]

    def estimate(self, case: Case) -> float:
        """Seconds: what the case took when it last ran on this GPU, whatever the sources, else its own estimate.

        The build's own, or next to nothing where it has been done.
        """
        if case.name == "build":
            is_done = build_kernels.is_current(build_kernels.extension_path(), (self.machine.arch,))
            return BUILT_SECONDS if is_done else case.seconds
        paths = sorted(self.out.glob(f"*/{self.record_path.name}"), key=lambda path: path.stat().st_mtime)
        known = [(read(path) or NOTHING)["cases"].get(case.name, {}) for path in paths]
        return next((entry["seconds"] for entry in reversed(known) if entry.get("status") == "passed"), case.seconds)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    toolkit = build_kernels.find_toolkit()
    homes = [] if toolkit is None else [toolkit.home / "bin", toolkit.home / "compute-sanitizer"]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, homes)))


def source_digest(machine: Machine) -> str:
    """Of every file that a result may depend on, of the libraries' versions and the driver's."""
    gpu = machine.origin.get("gpu") or {}
    versions = machine.origin.get("versions"), gpu.get("cuda"), gpu.get("state", {}).get("driver_version")
    digest = hashlib.sha256(repr(versions).encode())
    paths = (path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    for path in sorted(paths):
        digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Outcome(NamedTuple):
    """How a case ended: "passed", "failed", "killed" (it overran), "skipped" or "left out" (too little time)."""

    status: str
    seconds: float = 0.0
    reason: str = ""


Execute = Callable[[Case, float], "int | None"]  # a case and its limit in seconds -> exit code, None where killed


def obstacle(case: Case, run: Run, done: dict[str, Any], again: bool) -> str:
    """Why the case cannot or need not run; empty where it should."""
    missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if case.arch and run.machine.arch not in ("", case.arch):
        return f"for sm_{case.arch} only"
    if "{sanitizer}" in case.command and find_sanitizer() is None:
        return "no compute-sanitizer on the PATH or in the CUDA toolkit"
    result = run.result(case)
    is_done = done.get(case.name, {}).get("status") == "passed" and (result is None or result.exists())
    return DONE if is_done and not again and case.name != "build" else ""


def outcomes(
    cases: Sequence[Case],
    run: Run,
    minutes: float,
    done: dict[str, Any],
    again: bool,
    execute: Execute,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Case, Outcome]]:
    """Run the cases in their order; one that is not expected to end in time is left out for a shorter one behind it."""
    deadline = now() + 60.0 * minutes
    broken = ""
    for case in cases:
        reason = broken or obstacle(case, run, done, again)
        if reason:
            yield case, Outcome("skipped", reason=reason)
            continue
        estimate, left = run.estimate(case), deadline - now()
        if estimate > left:
            yield case, Outcome("left out", reason=f"takes about {estimate:.0f} s, {max(left, 0):.0f} s are left")
            broken = "the kernels are not built" if case.name == "build" else ""
            continue
        start = now()
        # Not by what it took with warm caches.
        code = execute(case, min(left, SLACK * max(estimate, case.seconds) + SLACK_SECONDS))
        seconds = now() - start
        if code is None:
            yield case, Outcome("killed", seconds, f"took longer than {seconds:.0f} s, about {estimate:.0f} expected")
            broken = "the build was killed" if case.name == "build" else ""
        elif code:
            yield case, Outcome("failed", seconds, f"exit code {code}")
            broken = "the build failed" if case.name == "build" else ""
        else:
            yield case, Outcome("passed", seconds)


def execute(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """The exit code of a process group that writes to `log`, or None: it was stopped after so many seconds."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where this program is interrupted
            stop(process)


def has_worked(case: Case, run: Run) -> bool:
    """Whether a case that ended well has written its result, or passed a test.

    pytest is content where every test is skipped, as for want of kernels that load.
    """
    result = run.result(case)
    if result is not None:
        return result.exists()
    return PYTEST not in case.command or PASSED.search(run.log(case).read_text(errors="replace")) is not None


def stop(process: subprocess.Popen[Any]) -> None:
    """End the process and everything it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(GRACE_SECONDS)
        except ProcessLookupError:  # none of the group is left
            return
        except subprocess.TimeoutExpired:
            continue


def select(names: Sequence[str]) -> list[Case]:
    """The cases whose names start with one of `names`, and the build, which is quick where nothing has changed."""
    unknown = [name for name in names if not any(case.name.startswith(name) for case in CASES)]
    if unknown:
        known = ", ".join(case.name for case in CASES)
        raise click.BadParameter(f"no case starts with {', '.join(unknown)}; there are {known}", param_hint="--only")
    return [c for c in CASES if not names or c.name == "build" or c.name.startswith(tuple(names))]


def pretend(run: Run) -> tuple[Execute, Callable[[], float]]:
    """An `execute` that takes exactly as long as estimated, and its clock."""
    clock = [0.0]

    def run_case(case: Case, limit: float) -> int:
        clock[0] += run.estimate(case)
        return 0

    return run_case, lambda: clock[0]


def dry_run(cases: Sequence[Case], run: Run, minutes: float, done: dict[str, Any], again: bool) -> None:
    """Print what would happen."""
    total = 0.0
    for case, outcome in outcomes(cases, run, minutes, done, again, *pretend(run)):
        total += outcome.seconds
        clock = f"{total / 60:5.1f} min" if outcome.status == "passed" else f"{outcome.status}: {outcome.reason}"
        click.echo(f"{case.name:26} {run.estimate(case):5.0f} s  {clock}")
        click.echo(f"    {case.command}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(min=0), default=float("inf"), help="Stop after so long.")
@click.option("--only", "names", multiple=True, metavar="NAME", help="Cases whose names start so; may be repeated.")
@click.option("--again", is_flag=True, help="Also run what has a result for these sources and this GPU.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="List the cases with their estimates and stop.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs" / "suite")
def main(minutes: float, names: Sequence[str], again: bool, is_dry_run: bool, out: Path) -> None:
    """Build, test, sanitize and measure on this machine's GPU, the most valuable cases first."""
    if math.isnan(minutes):
        raise click.BadParameter("nan is no length of time", param_hint="--minutes")
    cases = select(names)
    machine = Machine("no GPU", "", {}) if is_dry_run and not torch.cuda.is_available() else find_machine()
    run = Run(machine, source_digest(machine), out.resolve())
    record = read(run.record_path)
    if record is None:
        click.echo(f"{run.record_path} is no record of this suite: what it told of is run again", err=True)
        record = {"cases": {}}
    if is_dry_run:
        dry_run(cases, run, minutes, record["cases"], again)
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    record |= {"benchmark": "suite", "provenance": machine.origin, "sources": run.sources}
    environment = os.environ | {
        "SDGP_CUDA_ARCHS": machine.arch,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def run_case(case: Case, limit: float) -> int | None:
        click.echo(f"{case.name:26} about {run.estimate(case):.0f} s ... ", nl=False)
        # What an earlier run left would be taken for this one's, where this one ends early.
        record["cases"].pop(case.name, None)
        write(run.record_path, record)
        if (result := run.result(case)) is not None:
            result.unlink(missing_ok=True)
        code = execute(run.command(case), run.log(case), limit, environment)
        return NOTHING_DONE if code == 0 and not has_worked(case, run) else code

    failed = []
    click.echo(f"{machine.gpu}: {len(cases)} cases, results and logs in {run.folder}")
    for case, outcome in outcomes(cases, run, minutes, record["cases"], again, run_case):
        if outcome.status in ("skipped", "left out"):
            click.echo(f"{case.name:26} {outcome.status}: {outcome.reason}")
            if "command" not in record["cases"].get(case.name, {}):  # else it has run before
                record["cases"][case.name] = outcome._asdict()
            continue
        click.echo(f"{outcome.status} after {outcome.seconds:.0f} s {outcome.reason}")
        log, result = run.log(case), run.result(case)
        if outcome.status != "passed":
            failed.append(case.name)
            tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            click.echo("\n".join(f"    {line}" for line in tail))
        record["cases"][case.name] = {
            **outcome._asdict(), "command": case.command, "log": log.name,
            "result": result.name if result is not None and result.exists() else None, "gpu": state_of_gpu(),
        }  # fmt: skip
        write(run.record_path, record)
    write(run.record_path, record)
    if failed:
        raise click.ClickException(f"not passed: {', '.join(failed)}; logs are in {run.folder}")


def read(path: Path) -> dict[str, Any] | None:
    """What `write` has written; without cases where there is no file, None where it holds something else."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        is_whole = all(isinstance(case["status"], str) and case["seconds"] >= 0 for case in record["cases"].values())
        return record if is_whole else None
    except FileNotFoundError:
        return {"cases": {}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(path: Path, record: dict[str, Any]) -> None:
    """All or nothing, so that a crash leaves the last state."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
