"""The exact text of tables in each format, hostile text included."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from report.conftest import HOSTILE, made, row

from sweeper.report.tables import (
    LATEX_PACKAGES,
    Cell,
    Column,
    Table,
    beyond_latex,
    table_csv,
    table_latex,
    table_markdown,
    trials_csv,
)
from sweeper.report.write import table_files

TABLE = Table(
    name="small",
    caption="R4 & <us>",
    columns=(
        Column(title="lr"),
        Column(title="optimizer", numeric=False),
        Column(title="reported", group="test_accuracy"),
        Column(title="measured", group="test_accuracy"),
    ),
    rows=(
        (
            Cell(text="0.001", value=0.001),
            Cell(text="a|b_*"),
            Cell(text="0.7590", value=0.759),
            Cell(text="0.7600 ± 0.0010", value=0.1 + 0.66, deviation=0.001),
        ),
        (
            Cell(text="0.01", value=0.01),
            Cell(text=""),
            Cell(text="–"),
            Cell(text="not run", tone="muted"),
        ),
    ),
    note="100 %",
)


def test_markdown_is_one_line_a_row_and_shows_text_as_it_is() -> None:
    assert table_markdown(TABLE) == (
        "**R4 \\& \\<us\\>**\n"
        "\n"
        "| lr | optimizer | test\\_accuracy, reported | test\\_accuracy, measured |\n"
        "| ---: | :--- | ---: | ---: |\n"
        "| 0.001 | a\\|b\\_\\* | 0.7590 | 0.7600 ± 0.0010 |\n"
        "| 0.01 |  | – | not run |\n"
        "\n"
        "100 %\n"
    )


def test_latex_has_groups_over_columns_and_escapes_what_it_would_read() -> None:
    assert table_latex(TABLE) == (
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\caption{R4 \\& \\textless{}us\\textgreater{}}\n"
        "  \\resizebox{\\ifdim\\width>\\linewidth \\linewidth\\else \\width\\fi}{!}{%\n"
        "  \\begin{tabular}{rlrr}\n"
        "    \\toprule\n"
        "     &  & \\multicolumn{2}{c}{test\\_accuracy} \\\\\n"
        "    \\cmidrule(lr){3-4}\n"
        "    lr & optimizer & reported & measured \\\\\n"
        "    \\midrule\n"
        "    0.001 & a\\textbar{}b\\_{*} & 0.7590 & 0.7600 $\\pm$ 0.0010 \\\\\n"
        "    0.01 &  & -- & not run \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}}\n"
        "  \\par\\smallskip 100 \\%\n"
        "\\end{table}\n"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_and_is_no_wider_than_the_page(tmp_path: Path) -> None:
    """Whatever stands in a cell, at the start of a row as well, and however many columns."""
    nasty = [
        '[1pt] "q"',
        "* a, łódź, Škoda",
        "a_b % & # $ {x} ^ ~ \\ < > | ` ' ± − – ∞ … × ≈ ≤ ≥ é → — ’",
        "β-VAE, Ω µ αβγδεζηθικλμνξπρςστυφχψωΓΔΘΛΞΠΣΥΦΨ",
    ]
    table = Table(
        name="t",
        caption=nasty[2],
        columns=tuple(Column(title=nasty[2], group="g_1" * (n > 2)) for n in range(12)),
        rows=tuple((Cell(text=text), *(Cell(text=text, tone="bad"),) * 11) for text in nasty),
        note=nasty[-1],
    )
    assert beyond_latex(table_latex(table)) == ""
    source = tmp_path / "page.tex"
    source.write_text(
        f"\\documentclass{{article}}\\usepackage{{{','.join(LATEX_PACKAGES)}}}\n"
        f"\\begin{{document}}\n{table_latex(table)}\\end{{document}}\n",
        encoding="utf-8",
    )
    ended = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-draftmode", source.name],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    log = source.with_suffix(".log").read_text(encoding="latin-1")
    assert ended.returncode == 0, log[-2000:]
    assert "LaTeX Error" not in log
    assert "Overfull \\hbox" not in log


def test_the_file_of_latex_names_the_letters_that_pdflatex_may_lack() -> None:
    def head(note: str) -> list[str]:
        lines = table_files([replace(TABLE, note=note)])["table.tex"].splitlines()
        return [line for line in lines if line.startswith("%")]

    packages = r"% needs \usepackage{booktabs,graphicx}"
    assert head("β, é, łódź — 100 %") == [packages]
    lacking = "% pdfLaTeX may lack these; LuaLaTeX needs a font that has them: Ж中"
    assert head("中Ж, β, 中") == [packages, lacking]


def test_what_a_page_marks_with_a_colour_is_bold_in_print() -> None:
    cells = (
        Cell(text="+0.1", tone="good"),
        Cell(text="a*", tone="bad"),
        Cell(text="–", tone="muted"),
    )
    table = replace(TABLE, columns=tuple(Column(title=name) for name in "abc"), rows=(cells,))
    assert "| **+0.1** | **a\\*** | – |" in table_markdown(table)
    assert r"\textbf{+0.1} & \textbf{a{*}} & -- \\" in table_latex(table)


def test_csv_has_values_and_a_column_for_standard_deviations() -> None:
    assert table_csv(TABLE) == (
        'lr,optimizer,"test_accuracy, reported","test_accuracy, measured",'
        '"test_accuracy, measured, standard deviation"\n'
        "0.001,a|b_*,0.759,0.76,0.001\n"
        "0.01,,,not run,\n"
    )


def test_a_line_break_in_a_cell_breaks_no_row() -> None:
    table = Table(
        name="t",
        caption="c",
        columns=(Column(title="note", numeric=False),),
        rows=((Cell(text="one\ntwo"),),),
    )
    assert "| one two |" in table_markdown(table)
    assert "    one two \\\\" in table_latex(table)
    assert list(csv.reader(io.StringIO(table_csv(table)))) == [["note"], ["one\ntwo"]]


def test_a_spreadsheet_takes_nothing_in_a_csv_for_a_formula() -> None:
    texts = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "-0.5", "+1e-3", "−1", "a=b"]
    table = Table(
        name="t",
        caption="",
        columns=(Column(title="=title"), Column(title="count")),
        rows=tuple((Cell(text=text), Cell(text="7", value=7)) for text in texts),
    )
    titles, *rows = csv.reader(io.StringIO(table_csv(table)))
    assert titles == ["'=title", "count"]
    assert [row[0] for row in rows] == [
        *("'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\tx"),
        *("-0.5", "+1e-3", "−1", "a=b"),
    ]
    assert {row[1] for row in rows} == {"7"}
    data = made(row(0, params={"model.name": "=1+1"}, accuracy=0.5, worker="@home"))
    (line,) = csv.DictReader(io.StringIO(trials_csv(data.now)))
    assert (line["model.name"], line["worker"]) == ("'=1+1", "'@home")


def test_every_trial_is_in_the_csv_with_all_that_is_stored() -> None:
    data = made(
        row(0, params={"optimizer.name": "sgd"}, metrics={"seconds": 0.5}, worker=HOSTILE),
        row(1, params={"optimizer.name": "adam"}, accuracy=0.9, model_parameters=7),
        row(2, state="failed", outcome="crashed", error=HOSTILE, seconds=None),
        parameters={"optimizer.name": ["sgd", "adam"]},
    )
    lines = list(csv.DictReader(io.StringIO(trials_csv(data.now))))
    assert [line["number"] for line in lines] == ["1", "0", "2"]
    assert [line["state"] for line in lines] == ["complete", "complete", "failed"]
    assert lines[0]["objective.val_accuracy"] == lines[0]["test_accuracy"] == "0.9"
    assert lines[0]["model_parameters"] == "7"
    assert lines[1]["worker"] == HOSTILE
    assert lines[2]["trial_seconds"] == lines[2]["optimizer.name"] == ""
    assert (lines[1]["seconds"], lines[1]["trial_seconds"]) == ("0.5", "60.0")
