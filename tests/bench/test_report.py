"""The README shows what the result files say."""

from click.testing import CliRunner

from bench import report


def test_readme_is_in_step_with_the_results():
    result = CliRunner().invoke(report.main, ["--check"])
    assert result.exit_code == 0, result.output


def test_sections_are_filled_from_their_files(tmp_path):
    (tmp_path / "one.md").write_text("| a |\n")
    text = "before\n<!-- results: one.md -->\nold\n<!-- end -->\nafter\n"
    wanted = "before\n<!-- results: one.md -->\n\n| a |\n\n<!-- end -->\nafter\n"
    assert report.filled(text, tmp_path) == wanted
    assert report.filled(wanted, tmp_path) == wanted
