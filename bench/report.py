"""Build what is shown of the files under bench/results/: the README's sections, and speed.md and speed.png beside them.

    python -m bench.report            # write them
    python -m bench.report --check    # change nothing; exit 1 where one of them is out of step

A section of the README stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, NAME one of `SECTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from bench import figure
from bench.tables.learning import convergence
from bench.tables.pages import speed, summary
from bench.tables.steps import step_time

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- results: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SECTIONS: dict[str, Callable[[Path], str]] = {
    "summary": summary,
    "convergence": convergence,
    "step_time": step_time,
}


def filled(text: str, results: Path) -> str:
    """`text` with every marked section built from `results`.

    Raises ValueError for a marker that no section has or that no end follows, and `DamagedResult`.
    """

    def content(section: re.Match[str]) -> str:
        if section["name"] not in SECTIONS or section[0].count("<!-- results:") > 1:
            known = ", ".join(SECTIONS)
            raise ValueError(f"<!-- results: {section['name']} --> must name one of {known} and have an end of its own")
        return f"{section[1]}\n{SECTIONS[section['name']](results).strip()}\n\n{section[3]}"

    return SECTION.sub(content, text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 where something is out of step.")
def main(check: bool) -> None:
    """Write the result sections of the README, speed.md and speed.png."""
    text = README.read_text()
    try:
        pages = {README: filled(text, RESULTS), RESULTS / "speed.md": speed(RESULTS)}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if missing := set(SECTIONS) - {section["name"] for section in SECTION.finditer(text)}:
        raise click.ClickException(f"README.md has no section {', '.join(sorted(missing))}")
    picture = RESULTS / "speed.png"
    stale = [path.name for path, page in pages.items() if not path.exists() or path.read_text() != page]
    stale += [] if figure.is_current(picture, RESULTS) else [picture.name]
    if check and stale:
        names = " and ".join(stale)
        raise click.ClickException(f"out of step with bench/results/: {names}; run python -m bench.report")
    for path, page in pages.items():
        if path.name in stale:
            path.write_text(page)
    if picture.name in stale:
        figure.draw(RESULTS, picture)


if __name__ == "__main__":
    main()
