"""Step times of the models people ask about, one JSON and one page each.

    python -m bench.step_time --out bench/results            # the whole list, most telling first
    python -m bench.step_time --only resnet9

Every case runs `sdgp bench` in a process of its own, so that one that fails leaves the others standing. On a CPU the
list is short and small, and its results say that they are emulations. `bench.suite` runs them in a time box.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Case:
    """One call of `sdgp bench`; `options` follow the model's name."""

    name: str
    model: str
    options: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        """The whole command line."""
        target = out / f"step_time-{self.name}"
        files = ("--json", f"{target}.json", "--html", f"{target}.html")
        return [sys.executable, "-m", "sdgp_accel", "bench", self.model, *self.options, *files]


PAPER = ("--grad-weight", "dense", "--prune", "rescale_magnitude")
GPU_CASES = (
    Case("resnet9", "resnet9", ("--batch", "512", "--peers")),
    Case("vit_large", "vit_large_patch16_224", ("--batch", "128", "--optimizer", "adamw", "--peers")),
    Case("gpt_block", "gpt-block", ("--batch", "8", "--optimizer", "adamw", "--peers")),
    Case("resnet50", "resnet50", ("--batch", "256", "--peers")),
    Case("resnet18", "resnet18", ("--batch", "256", "--peers")),
    Case("regnet_x_400mf", "regnet_x_400mf", ("--batch", "256", "--peers")),
    Case("resnet9-paper", "resnet9", ("--batch", "512", *PAPER, "--peers")),
    Case("gpt2_medium", "gpt2-medium", ("--batch", "8", "--optimizer", "adamw", "--peers")),
    Case("vit_base", "vit_base_patch16_224", ("--batch", "256", "--optimizer", "adamw", "--peers")),
)
CPU_CASES = (
    Case("digits", "digits", ("--batch", "128", "--steps", "20")),
    Case("gpt_tiny", "gpt-tiny", ("--batch", "8", "--optimizer", "adamw", "--steps", "10")),
    Case("resnet9", "resnet9", ("--batch", "8")),
)
MODELS = tuple(dict.fromkeys(case.model for case in GPU_CASES))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the number of those that failed is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="names of cases")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    unknown = set(options.only or ()) - {case.name for case in cases}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in cases)}")
    chosen = [case for case in cases if not options.only or case.name in options.only]
    if options.dry_run:
        print("\n".join(" ".join(case.command(options.out)) for case in chosen))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [case.name for case in chosen if subprocess.run(case.command(options.out)).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
