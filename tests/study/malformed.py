"""Study files that people, editors and broken disks spoil: each mistake found, none a traceback.

``scripts/malformed`` runs a thousand through the command line, ``test_study_malformed.py`` a few.
Everything is drawn from a seed, so that what goes wrong can be had again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from study.test_study_parse import corpus

_ROOT: Final = Path(__file__).parents[2]
_BATCH: Final = 100
_BATCH_S: Final = 300.0
"""Far above what a hundred files take on a busy machine: what takes longer hangs."""

_VALUES: Final = (
    *("[]", "{}", "null", "true", "-1", "0", "1.5", "1e400", ".nan", "-.inf", "9" * 21),
    *("text", "''", "[1, a]", "{a: 1}", "0x1F", "2026-11-21", "on", "1_000", "- x", "[", "}", "%x"),
    *("!!python/object/apply:os.system [ls]", "!!int 3", "*nothing", "&a [*a]", "{<<: *a}", "| x"),
    *("'not closed", '"\\z"', '"\\U99999999"', "[" * 60, "a: b", "? a", "@x", "`x`", "x" * 5000),
)
_PIECES: Final = (
    *("\t", "\x00", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ufeff", "\ud7ff", "﷐", "\r", "é", "→"),
    *(":", "-", "'", '"', "{", "]", ",", "#", "&x ", "*x", "!", "%", "|", ">", "? ", "---\n"),
)
_BYTES: Final = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xff\xfe", b"\xf5\x80\x80\x80", b"\x00")


def _line(draw: random.Random, lines: list[str]) -> int:
    return draw.randrange(len(lines))


def _lost(draw: random.Random, lines: list[str]) -> None:
    del lines[_line(draw, lines)]


def _doubled(draw: random.Random, lines: list[str]) -> None:
    lines.insert(_line(draw, lines), lines[_line(draw, lines)])


def _indented(draw: random.Random, lines: list[str]) -> None:
    index = _line(draw, lines)
    lines[index] = draw.choice([" ", "   ", "\t", "  \t"]) + lines[index]


def _outdented(draw: random.Random, lines: list[str]) -> None:
    index = _line(draw, lines)
    lines[index] = lines[index][1:] if lines[index][:1] == " " else f" {lines[index]}"


def _misspelt(draw: random.Random, lines: list[str]) -> None:
    """A key with a letter swapped, lost or doubled."""
    index = _line(draw, lines)
    words = [found.span() for found in re.finditer(r"[A-Za-z_.]{3,}(?=:)", lines[index])]
    if words:
        start, end = draw.choice(words)
        word, at = lines[index][start:end], draw.randrange(end - start - 1)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        word = draw.choice([swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]])
        lines[index] = lines[index][:start] + word + lines[index][end:]


def _of_another_kind(draw: random.Random, lines: list[str]) -> None:
    """A value exchanged for one of another type, or for what YAML has special words for."""
    index = _line(draw, lines)
    values = [found.span(1) for found in re.finditer(r": ([^,{}\[\]#]+)", lines[index])]
    if values:
        start, end = draw.choice(values)
        lines[index] = lines[index][:start] + draw.choice(_VALUES) + lines[index][end:]


def _with_a_piece(draw: random.Random, lines: list[str]) -> None:
    index = _line(draw, lines)
    at = draw.randrange(len(lines[index]) + 1)
    lines[index] = lines[index][:at] + draw.choice(_PIECES) + lines[index][at:]


def _cut_off(draw: random.Random, lines: list[str]) -> None:
    index = _line(draw, lines)
    del lines[index + 1 :]
    lines[index] = lines[index][: draw.randrange(len(lines[index]) + 1)]


def _without_a_character(draw: random.Random, lines: list[str]) -> None:
    index = _line(draw, lines)
    if lines[index]:
        at = draw.randrange(len(lines[index]))
        lines[index] = lines[index][:at] + lines[index][at + 1 :]


def _anchored(draw: random.Random, lines: list[str]) -> None:
    """Aliases that repeat aliases, as a bomb has them."""
    depth = draw.randint(3, 12)
    lines += ["bomb0: &b0 [x, x]"]
    lines += [f"bomb{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, depth)]


def _with_a_list_for_a_key(draw: random.Random, lines: list[str]) -> None:
    lines.insert(_line(draw, lines), draw.choice(["[a, b]: c", "{a: b}: c", "1: c", "null: c"]))


_MUTATIONS: Final[tuple[Callable[[random.Random, list[str]], None], ...]] = (
    *(_lost, _doubled, _indented, _outdented, _misspelt, _of_another_kind, _of_another_kind),
    *(_with_a_piece, _cut_off, _without_a_character, _anchored, _with_a_list_for_a_key),
)


def originals() -> tuple[list[str], list[str]]:
    """The studies of the reports, valid, and the files of the broken corpus."""
    studies = [file.read_text("utf-8") for file in sorted(_ROOT.glob("studies/*.yaml"))]
    return studies, [text for text, *_ in corpus()]


def spoilt(seed: int) -> Iterator[bytes]:
    """Study files without end, each with one to three things done to it; some stay valid."""
    draw = random.Random(seed)
    known = originals()
    while True:
        lines = draw.choice(draw.choice(known)).splitlines() or [""]
        for _ in range(draw.choice([1, 1, 2, 3])):
            draw.choice(_MUTATIONS)(draw, lines)
            lines = lines or [""]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if draw.random() < 0.04:
            at = draw.randrange(len(content) + 1)
            content = content[:at] + draw.choice(_BYTES) + content[at:]
        yield content


@dataclass(kw_only=True)
class Account:
    """What came of so many files. ``wrong`` is empty where every one was handled as it must be."""

    malformed: int = 0
    valid: int = 0
    mistakes: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """For people."""
        common = [f"  {count:5} {text[:90]}" for text, count in self.messages.most_common(12)]
        lines = [
            f"malformed files     {self.malformed} (exit 2, every mistake with line and column)",
            f"still valid         {self.valid} (not counted)",
            f"mistakes            {self.mistakes}",
            f"distinct messages   {len(self.messages)}, values aside; the most frequent:",
            *common,
            f"seconds             {self.seconds:.0f}",
            f"wrong               {len(self.wrong)}",
            *(f"  {line}" for line in self.wrong),
        ]
        return "\n".join(lines)


def examine(folder: Path, count: int, seed: int) -> Account:
    """Run ``sweeper validate`` on spoilt files until ``count`` were malformed.

    A batch that ends in another way is run again file by file, to name the one it is about.
    """
    account, began, number = Account(), time.monotonic(), 0
    files = spoilt(seed)
    while account.malformed < count and not account.wrong:
        batch = []
        for content in (next(files) for _ in range(min(_BATCH, count - account.malformed))):
            file = folder / f"{number:05d}.yaml"
            file.write_bytes(content)
            batch.append(file)
            number += 1
        if not _judge(batch, account):
            for file in batch:
                if not _judge([file], account):
                    account.wrong.append(f"{file}: no list of mistakes with their places")
    account.seconds = time.monotonic() - began
    return account


def _judge(batch: Sequence[Path], account: Account) -> bool:
    """Enter a batch into the account; False, and nothing entered, where something is wrong."""
    command = [sys.executable, "-m", "sweeper", "validate", "--json", *map(str, batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BATCH_S, check=False
        )
        mistakes = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return False
    bad = {mistake["file"] for mistake in mistakes}
    placed = all(each["line"] >= 1 and each["column"] >= 1 and each["message"] for each in mistakes)
    if done.returncode != (2 if bad else 0) or not placed or "Traceback" in done.stderr:
        return False
    account.malformed += len(bad)
    account.valid += len(batch) - len(bad)
    account.mistakes += len(mistakes)
    account.messages.update(_without_values(each["message"]) for each in mistakes)
    return True


def _without_values(message: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d[\d.e+-]*", "…", message)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/malformed", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        account = examine(Path(folder), chosen.count, chosen.seed)
    sys.stdout.write(account.table() + "\n")
    sys.exit(bool(account.wrong))


if __name__ == "__main__":
    main()
