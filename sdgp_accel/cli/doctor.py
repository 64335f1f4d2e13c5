"""``sdgp doctor``: what is installed and built here, what this machine would use, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sdgp_accel import __version__
from sdgp_accel.backends import BUILD_COMMAND, FIRST_SPARSE_CAPABILITY

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
        Finding("sdgp_accel", __version__),
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


def has_sparse_tensor_cores() -> bool:
    """True where the current GPU multiplies 2:4 operands in hardware."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_SPARSE_CAPABILITY


def find_gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use")]
    findings = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        sparse = "" if (gpu.major, gpu.minor) >= FIRST_SPARSE_CAPABILITY else ", no sparse tensor cores"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}{sparse}"))
    return findings


def find_extension() -> list[Finding]:
    """Whether the CUDA extension is there, and for which architectures it was built."""
    try:
        # In a source checkout without a build, the folder cutlass_ops imports as an empty namespace: no ARCHS.
        archs = tuple(getattr(importlib.import_module("cutlass_ops"), "ARCHS", ()))
    except ModuleNotFoundError:
        archs = ()
    except ImportError as error:
        return [Finding("cutlass_ops", f"built, but it does not load: {error}", BUILD_COMMAND)]
    if archs:
        return [Finding("cutlass_ops", f"built for {', '.join(map(architecture, archs))}")]
    # Without a GPU to run it on, an absent extension is nothing to fix.
    return [Finding("cutlass_ops", "not built", BUILD_COMMAND if has_sparse_tensor_cores() else None)]


def architecture(name: str) -> str:
    """``"80"`` as ``sm_80`` (machine code); ``"compute_90"`` (PTX for later GPUs) as it is."""
    return name if name.startswith("compute_") else f"sm_{name}"


def find_backend() -> list[Finding]:
    """What ``backend="auto"`` comes down to on this machine."""
    if not has_sparse_tensor_cores():
        value = "reference: prunes, then dense ops; the numbers of the method, no speed"
    elif any(finding.fix for finding in find_extension()):
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
@click.option("--image-size", type=click.IntRange(min=1), help="Height and width of an image model's input.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample of a language model.")
@click.option("--arch", type=click.Choice(ARCHS), help="Of the GPU to place MODEL on.  [default: this one, or 90]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    model: str | None, batch: int, image_size: int | None, seq_len: int | None, arch: str | None, as_json: bool
) -> None:
    """Say what is built, what this machine would use, and what is missing.

    With a MODEL, also which kernel would run the backward of each of its layers (backend="cutlass"; "auto" measures on
    the GPU and leaves dense what does not gain). Exits with 1 where a GPU with sparse tensor cores is here but cannot
    be used.
    """
    findings = diagnose()
    layers = () if model is None else _place(model, batch, image_size, seq_len, arch or _this_arch())
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
            Console().print(_table(layers, f"{model}, batch {batch}, on sm_{arch or _this_arch()}"))
    if has_sparse_tensor_cores() and any(finding.fix == BUILD_COMMAND for finding in findings):
        raise SystemExit(1)


def _this_arch() -> str:
    here = "".join(map(str, torch.cuda.get_device_capability())) if has_sparse_tensor_cores() else ""
    return here if here in ARCHS else "90"


def _place(model: str, batch: int, image_size: int | None, seq_len: int | None, arch: str) -> tuple[Placement, ...]:
    from sdgp_accel import models, placement  # not needed for the diagnosis

    with torch.device("meta"):
        net = models.build(model, image_size=image_size, seq_len=seq_len)
        example = models.example_batch(model, batch, image_size=image_size, seq_len=seq_len, device="meta")
    return placement.placements(net, example, placement.GPUS[arch])


def _table(layers: tuple[Placement, ...], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("layer", "T×K→C", "dgrad", "wgrad"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    for layer in layers:
        style = "dim" if layer.dgrad == layer.wgrad == "dense" else ""
        table.add_row(layer.name, layer.shape, layer.dgrad, layer.wgrad, layer.reason, style=style)
    return table
