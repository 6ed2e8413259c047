"""How the trials ended, what went wrong and why, and what it all cost."""

from __future__ import annotations

from collections import Counter
from typing import Final

from sweeper.report.blocks import Block, Folded, Text
from sweeper.report.collect import StudyData, device_seconds
from sweeper.report.tables import Cell, Column, Table
from sweeper.report.wording import duration, last_line, plural
from sweeper.store import TrialRow

_FAILURES: Final = 10
_NAMED: Final = 12


def outcome_table(data: StudyData) -> Table:
    """One row an outcome: how many trials, and their device time."""
    groups: dict[tuple[str, str], list[TrialRow]] = {}
    for row in data.now.rows:
        said = (row.outcome or row.state).replace("_", " ")
        groups.setdefault((row.state, said), []).append(row)
    body = []
    for (state, said), rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        outcome = said if said in {state, f"{state}d"} else f"{said} ({state})"
        seconds = device_seconds(tuple(rows))
        body.append(
            (
                Cell(text=outcome, tone="bad" if state == "failed" else ""),
                Cell(text=f"{len(rows):,}", value=len(rows)),
                Cell(text=duration(seconds), value=round(seconds, 1)),
            )
        )
    whole = device_seconds(data.now.rows)
    body.append(
        (
            Cell(text="all"),
            Cell(text=f"{len(data.now.rows):,}", value=len(data.now.rows)),
            Cell(text=duration(whole), value=round(whole, 1)),
        )
    )
    return Table(
        name="outcomes",
        caption="How the trials ended",
        columns=(
            Column(title="outcome", numeric=False),
            Column(title="trials"),
            Column(title="device time", hint="time in which a worker had such a trial"),
        ),
        rows=tuple(body),
    )


def failures(data: StudyData) -> list[Block]:
    """Every different error: its last line, how often it came, and one full text, folded."""
    groups: dict[str, list[TrialRow]] = {}
    for row in data.now.rows:
        if row.error:
            groups.setdefault(last_line(row.error), []).append(row)
    if not groups:
        silent = Counter(row.outcome for row in data.now.rows if row.state == "failed")
        if silent:
            named = ", ".join(f"{count} {outcome}" for outcome, count in silent.items())
            return [Text(text=f"Failed without an error text: {named}.")]
        return []
    blocks: list[Block] = []
    frequent = sorted(groups.items(), key=lambda item: -len(item[1]))
    for line, rows in frequent[:_FAILURES]:
        numbers = ", ".join(str(row.number) for row in rows[:_NAMED])
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        who = f"{plural(len(rows), 'trial')} ({numbers}{more})"
        blocks.append(Folded(summary=f"{who}: {line}", text=rows[0].error or ""))
    if len(frequent) > _FAILURES:
        blocks.append(Text(text=f"and {plural(len(frequent) - _FAILURES, 'further error')}."))
    return blocks
