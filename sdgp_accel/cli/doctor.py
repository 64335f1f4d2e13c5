"""``sdgp doctor``: what is installed and built here, what this machine would use, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch

from sdgp_accel import __version__
from sdgp_accel.backends import BUILD_COMMAND, FIRST_SPARSE_CAPABILITY

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
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Say what is built, what this machine would use, and what is missing.

    Exits with 1 where a GPU with sparse tensor cores is here but cannot be used.
    """
    findings = diagnose()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.what:<{width}}  {finding.value}")
            if finding.fix:
                click.echo(f"{'':<{width}}  fix: {finding.fix}")
    if has_sparse_tensor_cores() and any(finding.fix == BUILD_COMMAND for finding in findings):
        raise SystemExit(1)
