"""Mistakes in study files: each found, at its place, in plain words, and all at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent, indent

import pytest

from sweeper.errors import Mistake, StudyFileError
from sweeper.space import Range, Values
from sweeper.study.parse import check, load, loads
from sweeper.study.spec import Random, StudySpec

HEAD = {
    "name": "name: s",
    "data": "data: {name: cifar10}",
    "model": "model: {name: mixer}",
    "search": "search: {trials: 5}",
}
"""The first four lines of a small file; what is tested stands from line 5 on."""
SPACE = "parameters: {train.batch_size: [32, 64]}"


def study(tail: str = "", **lines: str) -> str:
    """A study file: four lines, some of them replaced, and ``tail``."""
    head = "\n".join(line for line in {**HEAD, **lines}.values() if line)
    return f"{head}\n{dedent(tail).lstrip(chr(10))}"


def parameters(text: str) -> str:
    """A study file whose parameters begin in line 6."""
    return study("parameters:\n" + indent(dedent(text).strip("\n"), "  ") + "\n")


def mistakes(text: str, overrides: Sequence[str] = ()) -> list[Mistake]:
    try:
        loads(text, overrides, file="study.yaml")
    except StudyFileError as error:
        return list(error.mistakes)
    return []


CORPUS = Path(__file__).with_name("broken_studies.txt")
"""Broken files, each under a line ``## line:column path: part of the message``.

A file is the lines of HEAD and SPACE, those left out that are marked with ``!`` and those replaced
that are given anew, followed by whatever else is given.
"""


def corpus() -> Iterator[tuple[str, str, str, str]]:
    """Text, place, path and part of the message of each case."""
    for block in re.split(r"^## ", CORPUS.read_text(), flags=re.MULTILINE)[1:]:
        expected, *body = re.sub(r"^# .*\n", "", block, flags=re.MULTILINE).splitlines()
        found = re.fullmatch(r"(\d+:\d+) (\S*): (.+)", expected)
        assert found, expected
        parts: dict[str, str] = {**HEAD, "parameters": SPACE}
        for line in filter(None, body):
            if not line[0].isspace():
                key = line.split(":")[0].lstrip("!")
                parts[key] = ""
            parts[key] += "" if line[0] == "!" else f"{line}\n"
        text = "".join(f"{part.rstrip()}\n" for part in parts.values() if part)
        yield text, found[1], found[2], found[3]


CASES = [
    ("", "1:1", "", "must be a mapping with name, data and model, but it is empty"),
    ("- a\n", "1:1", "", "must be a mapping with name, data and model, but it holds a list"),
    ("mixer\n", "1:1", "", "but it holds 'mixer'; 'sweeper init' writes one"),
    *corpus(),
]


@pytest.mark.parametrize(
    ("text", "place", "path", "message"), CASES, ids=[f"{case[1]} {case[2]}" for case in CASES]
)
def test_a_mistake_is_found_at_its_place_and_told_plainly(
    text: str, place: str, path: str, message: str
) -> None:
    found = [mistake for mistake in mistakes(text) if message in mistake.message]
    assert found, mistakes(text)
    assert (f"{found[0].line}:{found[0].column}", found[0].path) == (place, path)
    assert len(mistakes(text)) == 1, mistakes(text)
    assert str(found[0]).startswith(f"study.yaml:{place}: ")


def test_no_word_of_pydantic_or_python_reaches_the_user() -> None:
    told = " ".join(str(mistake) for text, *_ in CASES for mistake in mistakes(text)).lower()
    for word in (
        *("input", "pydantic", "type=", "[key]", "constrained", "literal[", "function-", "none."),
        *("valid dictionary", "extra inputs", "discriminator", "traceback"),
    ):
        assert word not in told
    assert len(CASES) > 120
    assert len(told) > 10_000


SIX = """\
name: six
data: {name: cifar10, validation: 1.5}
model: {name: mixer, pach: 4}
optimizer: {lr: 1e-3, lr: 2e-3}
search: {trials: many, sampler: tpe}
parameters:
  optimizer.name: [adam, adm]
  model.blocks: {values: [2, 3], when: {optimizer.nme: adam}}
"""


def test_six_different_mistakes_are_six_lines_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "six.yaml"
    file.write_text(SIX)
    with pytest.raises(StudyFileError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    places = [line.removeprefix(f"{file}:").split(": ")[0] for line in lines]
    assert places == ["2:35", "3:22", "4:23", "5:18", "7:26", "8:41"]
    assert check(file) == list(caught.value.mistakes)


def test_what_yaml_refused_is_not_complained_about_twice() -> None:
    found = mistakes(study(SPACE + "\noptimizer: {lr: .inf}"))
    assert [mistake.message for mistake in found] == ["a number must be finite, but got .inf"]


def test_hundreds_of_mistakes_are_bounded_in_number_and_time() -> None:
    text = study(SPACE + "\ntrain:\n" + "".join(f"  epocs{i}: 1\n" for i in range(8000)))
    assert 100 <= len(mistakes(text)) <= 200
    many = "".join(f"  model.p{i}: [1]\n" for i in range(5000))
    found = mistakes(study("parameters:\n" + many))
    assert [(found[0].line, found[0].path)] == [(6, "parameters")]
    long = mistakes(study(SPACE + f"\n{'k' * 900}: 1\nresources: {{workers: {'v' * 90_000}}}\n"))
    assert [len(str(mistake)) < 400 for mistake in long] == [True, True]


def test_a_file_without_mistakes_becomes_a_spec(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        study(
            """
            objective: val_loss
            optimizer: {schedule: cosine}
            parameters:
              optimizer.name: [sgd, adam]
              optimizer.lr: {low: 1e-4, high: 1, log: true}
              optimizer.momentum: {values: [0.5, 0.9], when: {optimizer.name: adam}}
            """,
            search="search: {sampler: random, trials: 3}",
        )
    )
    spec = load(file)
    assert check(file) == []
    assert spec.objective[0].direction == "minimize"
    assert spec.optimizer.schedule.name == "cosine"
    assert isinstance(spec.search.sampler, Random)
    assert spec.parameters["optimizer.name"] == Values(values=("sgd", "adam"))
    assert spec.parameters["optimizer.lr"] == Range(low=1e-4, high=1, log=True)
    assert StudySpec.model_validate_json(spec.stored()) == spec


VALID = {
    "one configuration": study("", search="search: {trials: 1}"),
    "seeds": study("parameters: {train.seed: {low: 0, high: 4}}", search="search: {sampler: grid}"),
    "the right number of grid points": study(SPACE, search="search: {sampler: grid, trials: 2}"),
    "only published configurations": study(
        "reference: {source: r, trials: [{}, {params: {train.batch_size: 7}}]}",
        search="search: {sampler: reference}",
    ),
    "a variant with its own parameter": parameters(
        "model.name: [mixer, mlp]\nmodel.patch: {values: [4, 8], when: {model.name: mixer}}"
    ),
    "fields of the former variant are dropped": study(
        "parameters: {model.name: [mixer, mlp, vit]}", model="model: {name: mixer, patch: 4}"
    ),
    "a schedule by name and its field": parameters(
        "optimizer.schedule: [constant, exponential]\n"
        "optimizer.schedule.gamma: {values: [0.5, 0.9], when: {optimizer.schedule: exponential}}"
    ),
    "lists of augmentations": parameters("data.augment: [[], [flip, {name: crop, padding: 2}]]"),
    "whole bounds for a real field": parameters("optimizer.clip_norm: {low: 1, high: 5}"),
    "null as a value": parameters("optimizer.clip_norm: [null, 1.0]"),
    "a model of one's own": study(
        "parameters: {model.anything: [1, a]}", model="model: {name: 'pkg.mod:make', depth: 3}"
    ),
    "one's own model among others": parameters("model.name: [mixer, 'pkg.mod:make']"),
    "several objectives": study(f"{SPACE}\nobjective: [val_loss, {{metric: seconds, at: last}}]"),
    "a base that no trial has": study(
        "parameters: {model.patch: [4, 8]}", model="model: {name: vit}"
    ),
    "anchors": study(
        "optimizer: &o {lr: 0.1}\nreference: {source: r, trials: [{params: {optimizer.lr: 0.1}}]}\n"
        + SPACE
    ),
}


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_these_are_no_mistakes(text: str) -> None:
    spec = loads(text)
    assert StudySpec.model_validate_json(spec.stored()) == spec


def folder_study(root: object, patch: int = 4) -> str:
    return study(
        SPACE,
        data=f"data: {{name: image_folder, root: {str(root)!r}}}",
        model=f"model: {{name: mixer, patch: {patch}}}",
    )


def test_an_image_folder_is_made_absolute_and_gives_the_shape(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(size=(12, 8))
    text = study(
        SPACE, data=f"data:\n  name: image_folder\n  root: {root.name!r}", model=HEAD["model"]
    )
    monkeypatch.chdir(root.parent)
    spec = loads(text)
    assert spec.data.name == "image_folder"
    assert spec.data.root == str(root)
    monkeypatch.setenv("HOME", str(root.parent))
    assert loads(text.replace(repr(root.name), repr(f"~/{root.name}"))).data == spec.data
    found = mistakes(text.replace("{name: mixer}", "{name: mixer, patch: 3}"))
    assert "patch must divide the 8x12 image" in found[0].message


def test_a_folder_is_the_same_one_however_its_path_is_spelled(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder()
    monkeypatch.chdir(root.parent)
    spec = loads(folder_study(root.name))
    monkeypatch.chdir(root / "train")
    assert loads(folder_study(root.name), [f"data.root=../../{root.name}/"]) == spec
    content = json.loads(spec.stored())
    content["data"]["root"] = f"{root}/train/.."  # as a study that is in the store already has it
    assert StudySpec.model_validate_json(json.dumps(content)) == spec


def test_the_folder_above_a_link_is_where_the_system_finds_it(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder()
    (root.parent / "here").mkdir()
    (root.parent / "here/link").symlink_to(root / "train")
    monkeypatch.chdir(root.parent / "here")
    spec = loads(folder_study("link/.."))  # not "here", which has no pictures
    assert Path(spec.data.root).samefile(root)  # type: ignore[union-attr]  # an image folder


def test_conditions_on_a_folder_are_made_absolute_as_its_values_are(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = image_folder().parent
    for name in ("a", "b"):
        image_folder().rename(parent / name)
    monkeypatch.chdir(parent)
    spec = loads(
        study(
            """
            parameters:
              data.root: [a, b]
              model.patch: {values: [2, 4], when: {data.root: b}}
              model.blocks: {values: [1, 2], when: {data.root: [a, b]}}
            """,
            data="data: {name: image_folder, root: a}",
        )
    )
    a, b = str(parent / "a"), str(parent / "b")
    assert spec.parameters["data.root"] == Values(values=(a, b))
    assert spec.parameters["model.patch"].when == {"data.root": (b,)}
    assert spec.parameters["model.blocks"].when == {"data.root": (a, b)}


def test_an_image_folder_that_is_not_laid_out_as_one_is_a_mistake(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def told(root: object) -> str:
        found = mistakes(folder_study(root))
        assert [(mistake.line, mistake.path) for mistake in found] == [(2, "data.root")]
        return found[0].message

    layout = "train/<class>/*.jpg and test/<class>/*.jpg"
    assert layout in told(tmp_path / "missing")
    assert "~nobody-of-this-name" in told("~nobody-of-this-name/images")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{layout}, but {empty} has no folder train" in told(empty)
    root = image_folder()
    assert mistakes(folder_study(root)) == []
    deep = tmp_path / "deep"  # a level too many
    for part in ("train", "test"):
        (deep / part).mkdir(parents=True)
        shutil.copytree(root / part / "cat", deep / part / "pictures")
    assert "at least, but " in told(deep)
    assert "has 'pictures' alone; add another one" in told(deep)
    (root / "train" / "extra").mkdir()
    (root / "train" / "extra" / "0.png").write_bytes(b"")
    assert "train and test must have the same classes, but 'extra' of train" in told(root)
    for file in (root / "test").rglob("*.png"):
        file.unlink()
    assert "has no class folder with images" in told(root)


def test_validation_needs_neither_torch_nor_mlflow_nor_optuna_nor_numpy() -> None:
    code = (
        "import sys; from pathlib import Path; from sweeper.study.parse import check; "
        "check(Path(sys.argv[1])); "
        "print([m for m in ('torch', 'mlflow', 'optuna', 'numpy', 'PIL') if m in sys.modules])"
    )
    template = Path(sys.modules[StudySpec.__module__].__file__ or "").with_name("template.yaml")
    done = subprocess.run(
        [sys.executable, "-c", code, str(template)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
