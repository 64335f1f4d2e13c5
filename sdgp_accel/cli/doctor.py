"""``sdgp doctor``: what is installed and built here, what this machine would use, and how to get what is missing."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
import torch
from rich import box
from rich.table import Table

import cutlass_ops
import sdgp_accel
from cutlass_ops import build_kernels
from sdgp_accel.backends import FIRST_SPARSE_CAPABILITY, UPDATE_DRIVER, gpu, load_command
from sdgp_accel.cli.options import output, size_options

if TYPE_CHECKING:
    from sdgp_accel.placement import Placement

ARCHS = ("80", "86", "89", "90")  # as in placement.GPUS
# Extra of this package -> the modules it brings.
EXTRAS = {
    "vision": ("torchvision", "timm", "sklearn"),
    "report": ("matplotlib", "jinja2", "tensorboard"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `fix` is the command to run where something is missing, else None."""

    what: str
    value: str
    fix: str | None = None


def find_versions() -> list[Finding]:
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [
        Finding("sdgp_accel", sdgp_accel.__version__),
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("torch", f"{torch.__version__}, {cuda}"),
    ]


def find_extras() -> list[Finding]:
    findings = []
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        value = f"without {', '.join(missing)}" if missing else "installed"
        findings.append(Finding(f"extra {extra}", value, f"pip install 'sdgp_accel[{extra}]'" if missing else None))
    return findings


def find_gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use")]
    findings = []
    for index in range(torch.cuda.device_count()):
        here = torch.cuda.get_device_properties(index)
        if torch.version.cuda is None:
            kind, is_sparse = "not NVIDIA's", False
        else:
            kind, is_sparse = f"sm_{here.major}{here.minor}", (here.major, here.minor) >= FIRST_SPARSE_CAPABILITY
        memory = f"{here.total_memory / 2**30:.0f} GiB"
        sparse = "" if is_sparse else ", no sparse tensor cores"
        findings.append(Finding(f"GPU {index}", f"{here.name}, {kind}, {memory}{sparse}"))
    return findings


def find_extension() -> list[Finding]:
    """Whether the CUDA extension is there, loads, and was built for the GPUs here from the sources beside it."""
    if error := cutlass_ops.load_error():
        # Where nothing would run on it, it is nothing to fix.
        fix = load_command(error, build_command_here()) if gpu.sparse_gpus() else None
        return [Finding("cutlass_ops", f"built, but it does not load: {error}", fix)]
    archs, gpus = cutlass_ops.ARCHS, gpu.sparse_gpus()
    if not archs:
        # Without a GPU to run it on, an absent extension is nothing to fix.
        return [Finding("cutlass_ops", "not built", build_command_here() if gpus else None)]
    value = f"built for {', '.join(map(architecture, archs))}"
    file = cutlass_ops.path()
    if file is not None and build_kernels.INSTANCES.exists() and not build_kernels.is_current(file, archs):
        return [Finding("cutlass_ops", f"{value}, but from other sources than are here", build_command_here())]
    unfit = [capability for capability in gpus if not runs(archs, capability)]
    if unfit:
        return [Finding("cutlass_ops", f"{value}, not for {', '.join(map(gpu.own_arch, unfit))}", build_command_here())]
    problems = filter(None, map(launch_problem, gpus.values()))
    if problem := next(problems, None):
        value = f"{value}, but CUDA does not run it: {problem}; {UPDATE_DRIVER}"
        return [Finding("cutlass_ops", value, build_command_here())]
    if gpu.HOPPER in gpus and gpu.WGMMA_ARCHS.isdisjoint(archs):
        return [Finding("cutlass_ops", f"{value}: without the faster kernels of sm_90a", build_command_here())]
    return [Finding("cutlass_ops", value)]


def runs(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a build for `archs` runs on a GPU of this compute capability."""
    return any(gpu.runs_on(arch, capability) for arch in archs)


def launch_problem(index: int) -> str:
    """Of the GPU `index`, which the build is for."""
    return gpu.launch_problem(torch.device("cuda", index))


def build_command_here() -> str:
    """What builds the extension for the GPUs here, in the root of a checkout."""
    return gpu.build_command_for(gpu.sparse_gpus())


def architecture(name: str) -> str:
    """``"80"`` as ``sm_80`` (machine code); ``"compute_90"`` (PTX for later GPUs) as it is."""
    return name if name.startswith("compute_") else f"sm_{name}"


def find_backend() -> list[Finding]:
    """What ``backend="auto"`` comes down to on this machine."""
    gpus = gpu.sparse_gpus()
    built_for = [index for capability, index in gpus.items() if runs(cutlass_ops.ARCHS, capability)]
    if not gpus:
        value = "reference: prunes, then dense ops; the numbers of the method, no speed"
    elif all(map(launch_problem, built_for)):
        value = "dense: nothing is accelerated without cutlass_ops"
    else:
        value = "cutlass where it is faster than dense, else dense"
    return [Finding('backend="auto"', value)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (find_versions, find_extras, find_gpus, find_extension, find_backend)


def diagnose() -> list[Finding]:
    """Every finding of every check, in the order shown."""
    return [finding for check in CHECKS for finding in check()]


@click.command()
@click.argument("model", required=False)
@click.option("--batch", "-b", type=click.IntRange(min=1), default=64, show_default=True, help="Samples per step.")
@size_options
@click.option("--arch", type=click.Choice(ARCHS), help="Of the GPU to place MODEL on.  [default: this one, or 90]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    model: str | None, batch: int, image_size: int | None, seq_len: int | None, arch: str | None, as_json: bool
) -> None:
    """Say what is built, what this machine would use, and what is missing.

    With a MODEL, also which kernel would run the backward of each of its layers (backend="cutlass"; "auto" measures on
    the GPU and leaves dense what does not gain): its family and tile, ×N where a sum is split into N parts, "shared"
    where thread blocks share tiles. T×K→C is a layer's product in the forward pass: T output positions or tokens, K
    inputs to each of C channels.

    Exits with 1 where a GPU with sparse tensor cores is here and the kernels have not been built for it from these
    sources.
    """
    findings = diagnose()
    where, layers = ("", ()) if model is None else _place(model, batch, image_size, seq_len, arch)
    if as_json:
        found = [asdict(finding) for finding in findings]
        content = found if model is None else {"findings": found, "layers": [asdict(layer) for layer in layers]}
        click.echo(json.dumps(content, indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.what:<{width}}  {finding.value}")
            if finding.fix:
                click.echo(f"{'':<{width}}  fix: {finding.fix}")
        if model is not None:
            output().print(_table(layers, f"{model}, batch {batch}, on {where}"))
    if gpu.sparse_gpus() and any(finding.fix for finding in find_extension()):
        raise SystemExit(1)


def _place(
    model: str, batch: int, image_size: int | None, seq_len: int | None, arch: str | None
) -> tuple[str, tuple[Placement, ...]]:
    """The architecture to place the layers on, that of this machine's GPU where none is named, and where they run."""
    from sdgp_accel import models, placement  # not needed for the diagnosis

    device = placement.GPUS[arch or "90"]
    if arch is None and (gpus := gpu.sparse_gpus()):
        capability, first = next(iter(gpus.items()))
        properties = torch.cuda.get_device_properties(first)
        multiprocessors, is_hopper = properties.multi_processor_count, capability == gpu.HOPPER
        device = gpu.Device(capability, multiprocessors, is_hopper, gpu.shared_bytes(properties))
    with torch.device("meta"):
        net = models.build(model, image_size=image_size, seq_len=seq_len)
        example = models.example_batch(model, batch, image_size=image_size, seq_len=seq_len, device="meta")
    return "sm_{}{}".format(*device.capability), placement.placements(net, example, device)


def _table(layers: tuple[Placement, ...], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("layer", "T×K→C", "dgrad", "wgrad", "why"):
        table.add_column(column, overflow="fold")
    for layer in layers:
        style = "dim" if layer.dgrad == layer.wgrad == "dense" else ""
        table.add_row(layer.name, layer.shape, layer.dgrad, layer.wgrad, layer.reason, style=style)
    return table
