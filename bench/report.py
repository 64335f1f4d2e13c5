"""Build the README's result sections from the files under bench/results/.

    python -m bench.report            # write every section between its markers in the README
    python -m bench.report --check    # change nothing; exit 1 where the README is out of step

A section stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, NAME one of `SECTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from bench import tables

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- results: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SECTIONS: dict[str, Callable[[Path], str]] = {
    "summary": tables.summary,
    "convergence": tables.convergence,
    "layers": tables.layers,
    "gemm": tables.gemm,
    "prune": tables.prune,
    "step_time": tables.step_time,
}


def filled(text: str, results: Path) -> str:
    """`text` with every marked section built from `results`.

    Raises ValueError for a marker that no section has or that no end follows, and `tables.DamagedResult`.
    """

    def content(section: re.Match[str]) -> str:
        if section["name"] not in SECTIONS or section[0].count("<!-- results:") > 1:
            known = ", ".join(SECTIONS)
            raise ValueError(f"<!-- results: {section['name']} --> must name one of {known} and have an end of its own")
        return f"{section[1]}\n{SECTIONS[section['name']](results).strip()}\n\n{section[3]}"

    return SECTION.sub(content, text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 where the README is out of step.")
def main(check: bool) -> None:
    """Write the result sections of the README."""
    text = README.read_text()
    try:
        wanted = filled(text, RESULTS)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if missing := set(SECTIONS) - {section["name"] for section in SECTION.finditer(text)}:
        raise click.ClickException(f"README.md has no section {', '.join(sorted(missing))}")
    if check and text != wanted:
        raise click.ClickException("README.md is out of step with bench/results/: run python -m bench.report")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
