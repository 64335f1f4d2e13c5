"""Keep the README's result tables in step with the files under bench/results/.

    python -m bench.report            # copy each results/NAME.md between its markers in the README
    python -m bench.report --check    # change nothing; exit 1 where the README is out of step

A table stands between ``<!-- results: NAME.md -->`` and ``<!-- end -->``; whoever writes a result writes its NAME.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- results: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """`text` with every marked section holding its file from `results`; FileNotFoundError where one is missing."""

    def content(section: re.Match[str]) -> str:
        return f"{section[1]}\n{(results / section['name']).read_text().strip()}\n\n{section[3]}"

    return SECTION.sub(content, text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 where the README is out of step.")
def main(check: bool) -> None:
    """Copy the result tables into the README."""
    text = README.read_text()
    wanted = filled(text, RESULTS)
    if check and text != wanted:
        raise click.ClickException("README.md is out of step with bench/results/: run python -m bench.report")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
