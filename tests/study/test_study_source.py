"""YAML with places: what text means, and what is refused, where."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.errors import StudyFileError
from sweeper.study.nodes import Node
from sweeper.study.source import MAX_BYTES, MAX_DEPTH, MAX_MISTAKES, MAX_NODES, compose, read


def composed(text: str) -> Any:
    root, mistakes = compose(text, "study.yaml")
    assert not mistakes
    assert root is not None
    return root.data


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("12", 12),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-11-21", "2026-11-21"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("package.module:factory", "package.module:factory"),
        ("[1, a, [2.0]]", [1, "a", [2.0]]),
        ("{a: 1, b: {}}", {"a": 1, "b": {}}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(written: str, meant: object) -> None:
    value = composed(f"key: {written}")["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_every_key_and_value_knows_its_line_and_column() -> None:
    root, _ = compose("# comment\na: 1\nb:\n  c: [x,\n      {d: 2}]\n", "study.yaml")
    assert root is not None

    def place(*path: str | int) -> tuple[int, int]:
        node = root.find(path)
        assert node is not None
        return node.place.line, node.place.column

    assert place() == (2, 1)
    assert place("a") == (2, 4)
    assert place("b", "c") == (4, 6)
    assert place("b", "c", 0) == (4, 7)
    assert place("b", "c", 1, "d") == (5, 11)
    inner = root.find(("b", "c", 1))
    assert inner is not None
    assert (inner.keys["d"].line, inner.keys["d"].column) == (5, 8)
    assert root.find(("b", "c", 2)) is None
    assert root.find(("a", "x")) is None


def test_columns_count_characters_whatever_their_bytes_and_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "windows.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + "name: é\r\ndescription: {é: ü, é: x}\r\n".encode())
    _, mistakes = compose(read(file), str(file))
    assert [(mistake.line, mistake.column) for mistake in mistakes] == [(2, 21)]


def test_an_alias_repeats_a_value_and_keeps_the_places_inside_it() -> None:
    root, mistakes = compose("a: &x {k: 1}\nb: *x\n", "study.yaml")
    assert not mistakes
    assert root is not None
    assert root.data == {"a": {"k": 1}, "b": {"k": 1}}
    whole, inner = root.find(("b",)), root.find(("b", "k"))
    assert whole is not None
    assert inner is not None
    assert (whole.place.line, whole.place.column) == (2, 4)
    assert (inner.place.line, inner.place.column) == (1, 11)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BROKEN = [
    # text, line, column, part of the message
    (
        "a: [1, 2\nb: 3\n",
        2,
        2,
        "the list that begins in line 1 must go on with ',' or end with ']'",
    ),
    ("a: {b: 1\n", 2, 1, "end with '}', but here is the end of the file"),
    ("a: b: c\n", 1, 5, "another ':'"),
    ("a: 1\n b: 2\n", 2, 3, "another ':'"),
    ("a:\n\tb: 1\n", 2, 1, "here is a tab"),
    ("a:\tb\n", 1, 3, "here is a tab"),
    ("a: 1\nb\nc: 2\n", 2, 1, "a key must be followed by ': '"),
    ("a: 'x\nb: 1\n", 1, 4, "the quote that opens here must be closed"),
    ('a: "\\q"\n', 1, 6, "\\q means nothing"),
    ('a: "\\U99999999"\n', 1, 7, "must stand for something"),
    ("a: *\n", 1, 4, "must not begin with * or &"),
    ("a: @x\n", 1, 4, "must not begin with @"),
    ("a: %x\n", 1, 4, "must not begin with %"),
    ("a: !x!y z\n", 1, 4, "must not begin with !"),
    ("- a\nb: 1\n", 2, 1, "lines of one list must be indented alike"),
    ("a: 1\n- b\n", 2, 1, "a list entry does not continue the one that begins in line 1"),
    ("a:\n  - 1\n - 2\n", 3, 2, "must be indented alike"),
    ("a: - 1\n", 1, 4, "must begin a line of its own"),
    ("a: 1\n---\nb: 1\n", 2, 1, "must hold one document"),
    ("%YAML 3.0\n---\na: 1\n", 1, 1, "without '%' lines"),
    ("a: >9x\n  b\n", 1, 6, "must be YAML"),
    ("a: !!int 3\n", 1, 4, "tags such as !!int"),
    ("a: !!python/object/apply:os.system ['true']\n", 1, 4, "tags such as !!int"),
    ("a: ! b\n", 1, 4, "tags such as !!int"),
    ("a: &x [*x]\n", 1, 8, "*x must repeat an earlier &x, but its own value is not finished"),
    ("a: *y\n", 1, 4, "there is none above"),
    ("a: 1\nb: 2\na: 3\n", 3, 1, "'a' is there already (line 1)"),
    ("a: {b: 1, b: 2}\n", 1, 11, "'b' is there already"),
    ("1: 2\n", 1, 1, "a key must be text, but got 1; put it in quotes"),
    ("null: 2\n", 1, 1, "a key must be text, but got null"),
    ("true: 2\n", 1, 1, "a key must be text, but got true"),
    ("[1]: 2\n", 1, 1, "got a list or a mapping"),
    ("? {a: b}\n: 2\n", 1, 3, "got a list or a mapping"),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, 3, "<< (merging)"),
    ("a: .inf\n", 1, 4, "a number must be finite, but got .inf"),
    ("a: [.NaN]\n", 1, 5, "a number must be finite"),
    ("a: 1e999\n", 1, 4, "1e999 is too large"),
    ("a: 9223372036854775808\n", 1, 4, "64 bits"),
    (f"a: {'9' * 5000}\n", 1, 4, "64 bits"),
    (f"a: 0x{'f' * 5000}\n", 1, 4, "64 bits"),
    ('a: "x\\0y"\n', 1, 4, "U+0000"),
    ('a: "\\ud800"\n', 1, 4, "U+D800"),
    ("a: x\x00y\n", 1, 5, "U+0000 (a control character)"),
    ("a: 1\nb: \x1b[31m\n", 2, 4, "U+001B"),
    ("a: x\u2028y\n", 1, 5, "U+2028 (line separator)"),
    (f"a: {'[' * (MAX_DEPTH + 5)}", 1, MAX_DEPTH + 3, f"at most {MAX_DEPTH} deep"),
    ("- " * 5000, 1, 2 * MAX_DEPTH + 1, f"at most {MAX_DEPTH} deep"),
    (
        f"a: &a {'[' * 12}{']' * 12}\nb: {'[' * 12}*a{']' * 12}\n",
        2,
        16,
        "at most 20 deep, aliases included",
    ),
    (BOMB, 5, 28, f"at most {MAX_NODES:,} values"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "message"), BROKEN, ids=[repr(case[0][:30]) for case in BROKEN]
)
def test_mistakes_of_syntax_have_their_place_and_a_plain_sentence(
    text: str, line: int, column: int, message: str
) -> None:
    _, mistakes = compose(text, "study.yaml")
    assert [(m.file, m.line, m.column) for m in mistakes] == [("study.yaml", line, column)]
    assert message in mistakes[0].message


def test_one_mistake_does_not_hide_the_others() -> None:
    root, mistakes = compose("a: 1\na: 2\n3: x\nb: !!int 4\nc: .nan\n", "study.yaml")
    assert [mistake.line for mistake in mistakes] == [2, 3, 4, 5]
    assert isinstance(root, Node)
    assert root.data == {"a": 1, "b": 4, "c": None}


def test_so_many_mistakes_are_enough() -> None:
    root, mistakes = compose("a: 1\n" * 5000, "study.yaml")
    assert root is None
    assert len(mistakes) == MAX_MISTAKES


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_text_is_null(text: str) -> None:
    assert composed(text) is None


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"a: 1\nb: \xff\xff\n", (2, 4), "0xff"),
        ("a: ü\nb: é".encode("latin-1"), (1, 4), "must be UTF-8"),
        ("a: 1".encode("utf-16"), (1, 1), "UTF-16"),
        (b"\xef\xbb\xbfa: \xff", (1, 4), "0xff"),
        (b"# " + b"x" * MAX_BYTES, (0, 0), "256 KiB"),
    ],
)
def test_files_that_are_no_text_or_too_large(
    nasty_folder: Path, content: bytes, place: tuple[int, int], message: str
) -> None:
    file = nasty_folder / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(StudyFileError, match=message) as caught:
        read(file)
    mistake = caught.value.mistakes[0]
    assert (mistake.line, mistake.column) == place
    assert mistake.file == str(file)


@pytest.mark.parametrize("name", [".", "missing.yaml", "missing/study.yaml", "nul\0byte.yaml"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyFileError, match="the study file must be readable, but"):
        read(tmp_path / name)


@given(st.text(max_size=200) | st.text(alphabet="ab:-[]{}&*!|>'\"%@#,? \n\t\\0.<~", max_size=60))
def test_no_text_whatever_raises_or_takes_long(text: str) -> None:
    started = time.perf_counter()
    root, mistakes = compose(text, "study.yaml")
    assert root is not None or mistakes
    assert all(mistake.line >= 1 and mistake.column >= 1 for mistake in mistakes)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_BYTES,
        "{" * MAX_BYTES,
        "? " * (MAX_BYTES // 2),
        "a: " + "[a, " * (MAX_BYTES // 4 - 1),
        "a: '" + "''" * (MAX_BYTES // 2 - 4),
        "- &a a\n" * (MAX_BYTES // 7),
        "{a: b," + " a: b," * (MAX_BYTES // 6 - 2) + "}",
        "a:\n" + "  - {b: c, d: e}\n" * (MAX_BYTES // 17 - 1),
        "!" * MAX_BYTES,
        "a: " + "word " * (MAX_BYTES // 5 - 1),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_the_largest_files_take_a_moment_at_most(text: str) -> None:
    assert len(text) <= MAX_BYTES
    started = time.process_time()
    compose(text, "study.yaml")
    assert time.process_time() - started < 4  # on a slow machine; bounded is what matters
