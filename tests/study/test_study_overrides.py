"""``--set path=value``: what it reaches, what it does to parameters, and how mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.errors import StudyFileError
from sweeper.space import Range, Values
from sweeper.study.parse import loads
from sweeper.study.spec import StudySpec

TEXT = """\
name: s
objective: val_accuracy
data: {name: cifar10, augment: [flip]}
model: {name: mixer, patch: 4, embed_dim: 64}
optimizer: {lr: 0.1, schedule: exponential}
search: {trials: 5, sampler: tpe}
parameters:
  optimizer.name: [sgd, momentum, adam]
  optimizer.lr: {low: 1e-4, high: 0.1, log: true}
  optimizer.momentum: {values: [0.1, 0.9], when: {optimizer.name: [momentum, adam]}}
  optimizer.beta2: {values: [0.9, 0.99], when: {optimizer.name: adam, optimizer.momentum: 0.9}}
  model.blocks: [1, 2, 4]
reference:
  source: r
  trials:
    - params: {optimizer.lr: 0.01}
      note: first
"""


def loaded(*overrides: str) -> StudySpec:
    return loads(TEXT, overrides)


def told(*overrides: str) -> list[str]:
    with pytest.raises(StudyFileError) as caught:
        loaded(*overrides)
    assert all(m.file == "--set" and (m.line, m.column) == (0, 0) for m in caught.value.mistakes)
    return [str(mistake) for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=other", "name", "other"),
        ("search.trials=20", "search.trials", 20),
        ("train.epochs=3", "train.epochs", 3),
        ("optimizer.weight_decay=1e-3", "optimizer.weight_decay", 1e-3),
        ("description=a=b", "description", "a=b"),
        ("search.sampler=random", "search.sampler.name", "random"),
        ("search.sampler.startup_trials=3", "search.sampler.startup_trials", 3),
        ("search.pruner={name: asha, min_epochs: 2}", "search.pruner.min_epochs", 2),
        ("optimizer.schedule.gamma=0.5", "optimizer.schedule.gamma", 0.5),
        ("optimizer.schedule=cosine", "optimizer.schedule.name", "cosine"),
        ("train.loss= mse ", "train.loss", "mse"),
        ("resources.workers=2", "resources.workers", 2),
        ("faults.retries=0", "faults.retries", 0),
    ],
)
def test_an_override_reaches_every_section(override: str, path: str, value: object) -> None:
    found: Any = loaded(override)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_parts_of_lists_and_of_parameters_can_be_set() -> None:
    spec = loaded(
        "objective.at=last",
        "data.augment=[flip, {name: crop, padding: 2}]",
        "data.augment.1.padding=1",
        "parameters.optimizer.lr.low=1e-3",
        "parameters.model.blocks=[3, 4]",
        "parameters.model.dropout=[0.0, 0.1]",
        "parameters.model.skip.values=[true, false]",
        "parameters.model.skip.when.optimizer.name=adam",
        "reference.trials.0.params.optimizer.lr=0.02",
        "reference.trials.0.note=second",
    )
    assert spec.objective[0].at == "last"
    assert spec.data.augment[1].model_dump(exclude_unset=True) == {"name": "crop", "padding": 1}
    assert spec.parameters["optimizer.lr"] == Range(low=1e-3, high=0.1, log=True)
    assert spec.parameters["model.blocks"] == Values(values=(3, 4))
    assert spec.parameters["model.dropout"] == Values(values=(0.0, 0.1))
    assert spec.parameters["model.skip"] == Values(
        values=(True, False), when={"optimizer.name": ("adam",)}
    )
    assert spec.reference is not None
    assert spec.reference.trials[0].params == {"optimizer.lr": 0.02}
    assert spec.reference.trials[0].note == "second"


def test_a_condition_can_be_given_to_a_plain_list() -> None:
    spec = loaded("parameters.model.blocks.when={optimizer.name: sgd}")
    assert spec.parameters["model.blocks"] == Values(
        values=(1, 2, 4), when={"optimizer.name": ("sgd",)}
    )


def test_later_overrides_go_over_earlier_ones() -> None:
    assert loaded("train.epochs=3", "train.epochs=4").train.epochs == 4


def test_setting_a_parameter_fixes_it() -> None:
    spec = loaded("model.blocks=3")
    assert "model.blocks" not in spec.parameters
    assert spec.trial_config({}).model.model_dump()["blocks"] == 3


def test_conditions_that_a_fixed_value_meets_are_met() -> None:
    spec = loaded("optimizer.name=momentum")
    assert "optimizer.name" not in spec.parameters
    assert spec.optimizer.name == "momentum"
    assert spec.parameters["optimizer.momentum"] == Values(values=(0.1, 0.9))
    assert "optimizer.beta2" not in spec.parameters  # which only Adam has


def test_parameters_that_a_fixed_value_excludes_are_gone_and_what_needs_them() -> None:
    assert list(loaded("optimizer.name=sgd").parameters) == ["optimizer.lr", "model.blocks"]


def test_a_conditional_parameter_keeps_its_condition_when_fixed() -> None:
    spec = loaded("optimizer.momentum=0.9")
    assert spec.parameters["optimizer.momentum"] == Values(
        values=(0.9,), when={"optimizer.name": ("momentum", "adam")}
    )
    assert spec.parameters["optimizer.beta2"].when["optimizer.momentum"] == (0.9,)
    assert "optimizer.beta2" not in loaded("optimizer.momentum=0.5").parameters


SCHEDULES = """\
name: s
data: {name: digits}
model: {name: mlp}
search: {trials: 5}
parameters:
  optimizer.schedule: [constant, cosine, exponential]
  optimizer.schedule.gamma: {values: [0.5, 0.9], when: {optimizer.schedule: exponential}}
"""
"""The schedule is a parameter as a whole."""
NAMES = SCHEDULES.replace("optimizer.schedule:", "optimizer.schedule.name:")
"""Its name is one."""


@pytest.mark.parametrize("text", [SCHEDULES, NAMES], ids=["schedule", "schedule.name"])
@pytest.mark.parametrize(
    "override",
    [
        "optimizer.schedule=exponential",
        "optimizer.schedule.name=exponential",
        "optimizer={lr: 0.2, schedule: exponential}",
    ],
)
def test_a_name_and_what_it_names_are_one_parameter(text: str, override: str) -> None:
    spec = loads(text, [override])
    assert spec.parameters == {"optimizer.schedule.gamma": Values(values=(0.5, 0.9))}
    schedule = spec.trial_config({"optimizer.schedule.gamma": 0.9}).optimizer.schedule
    assert schedule.model_dump() == {"name": "exponential", "gamma": 0.9}


def test_setting_what_holds_parameters_fixes_those_that_the_value_names() -> None:
    spec = loaded("optimizer={name: momentum, momentum: 0.1}")
    assert list(spec.parameters) == ["optimizer.lr", "model.blocks"]
    assert spec.optimizer.model_dump(exclude_unset=True) == {"name": "momentum", "momentum": 0.1}
    spec = loads(NAMES, ["search.trials=1", "optimizer.schedule={name: exponential, gamma: 0.7}"])
    assert not spec.parameters
    assert spec.optimizer.schedule.model_dump() == {"name": "exponential", "gamma": 0.7}
    models = TEXT.replace("model.blocks: [1", "model.name: [mixer, mlp]\n  model.width: [1")
    models = models.replace("[1, 2, 4]", "{values: [1, 2], when: {model.name: mlp}}")
    assert "model.name" in loads(models).parameters
    spec = loads(models, ["model={name: mixer, patch: 8}"])
    assert not [path for path in spec.parameters if path.startswith("model")]


def test_a_field_inside_a_parameter_stays_one_when_fixed() -> None:
    """The parameter around it goes over the section."""
    text = SCHEDULES.replace("[constant, cosine, exponential]", "[exponential]")
    text = text.replace("{values: [0.5, 0.9], when: {optimizer.schedule: exponential}}", "[0.5, 1]")
    spec = loads(text, ["search.trials=1", "optimizer.schedule.gamma=0.7"])
    assert spec.parameters["optimizer.schedule.gamma"] == Values(values=(0.7,))


def test_null_removes_a_parameter() -> None:
    spec = loaded("parameters.model.blocks=null", "parameters.optimizer.lr=")
    assert list(spec.parameters) == ["optimizer.name", "optimizer.momentum", "optimizer.beta2"]
    assert spec.optimizer.lr == 0.1


def test_another_name_drops_the_fields_of_the_former_variant() -> None:
    spec = loaded("model.name=mlp", "parameters.model.blocks=null")
    assert spec.model.model_dump(exclude_unset=True) == {"name": "mlp"}
    spec = loaded("model.name=vit", "model.patch=8")
    assert spec.model.model_dump(exclude_unset=True) == {
        "name": "vit",
        "patch": 8,
        "embed_dim": 64,
    }
    spec = loaded("search.sampler={name: nsga2, population: 4}", "search.sampler.name=qmc")
    assert spec.search.sampler.model_dump() == {"name": "qmc"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.trials=0"],
            "--set: search.trials: must be a whole number of at least 1 or null, but got 0",
        ),
        (["model.pach=3"], "--set: model.pach: model mixer has no field 'pach'; did you mean"),
        (["optimzer.lr=3"], "--set: optimzer: there is no section 'optimzer'; did you mean"),
        (["train.batch_size=big"], "but got 'big' (--set train.batch_size=big)"),
        (["model.patch=5"], "--set: model.patch: patch must divide the 32x32 image"),
        (["parameters.optimizer.lr.low=0.5"], "low <= high must hold, but got low=0.5, high=0.1"),
        (["parameters.lr=[1, 2]"], "did you mean 'optimizer.lr'? (--set parameters.lr=[1, 2])"),
        (["trials"], "must read path=value, as in search.trials=20 (--set trials)"),
        (["=3"], "must read path=value"),
        (["train.epochs={"], "the value must be YAML, but: "),
        (["train.epochs=!!int 3"], "tags such as !!int"),
        (
            ["train.epochs=2", "train.epochs.x=3"],
            "nothing can be set inside train.epochs, which is ",
        ),
        (
            ["optimizer.lr.low=3"],
            "which is a parameter; set optimizer.lr itself, or parameters.optimizer.lr",
        ),
        (
            ["parameters.data.augment=[[], [flip]]", "data.augment.1.p=0.2"],
            "nothing can be set inside data.augment, which is a parameter; set data.augment itself",
        ),
        (["reference.trials.1.note=x"], "trials is a list, whose entries are 0 to 0, but got '1'"),
        (["reference.trials.first.note=x"], "but got 'first'"),
        (["reference.trials.99999999999999999999.note=x"], "whose entries are 0 to 0"),
        (["data.root=/tmp"], "root belongs to data image_folder; this data is cifar10"),
        (["objective=test_loss"], "the test set never selects anything"),
        (["model=mlp"], "--set: model: must be a mapping with a name"),
    ],
)
def test_mistakes_name_the_override(overrides: list[str], message: str) -> None:
    lines = told(*overrides)
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert lines[0].endswith(f"(--set {overrides[-1]})")


def test_a_parameter_of_the_former_model_is_named_after_a_change_of_model() -> None:
    with pytest.raises(StudyFileError) as caught:
        loaded("model.name=mlp")
    assert [(m.line, m.path, m.message) for m in caught.value.mistakes] == [
        (12, "parameters.model.blocks", "blocks belongs to model mixer, vit; this model is mlp")
    ]


def test_mistakes_of_file_and_overrides_come_together_the_overrides_first() -> None:
    with pytest.raises(StudyFileError) as caught:
        loads(TEXT.replace("val_accuracy", "val_acc"), ["train.epochs=0", "nonsense"])
    assert [(m.file, m.line) for m in caught.value.mistakes] == [
        ("--set", 0),
        ("--set", 0),
        ("<text>", 2),
    ]


PATHS = st.lists(
    st.sampled_from(
        [
            *("name", "data", "model", "optimizer", "search", "parameters", "reference", "trials"),
            *("params", "when", "lr", "schedule", "0", "values", "low", "sampler", "pruner"),
            *("objective", "augment", "optimizer.lr", "model.blocks", "x", "train.epochs", "root"),
        ]
    )
    | st.text(max_size=3),
    max_size=4,
).map(".".join)
WORDS = st.sampled_from(
    ["null", "3", "{}", "[]", "mlp", "cosine", "[1, 2]", "{low: 1}", "a: b", "@"]
)


@given(st.lists(st.tuples(PATHS, WORDS | st.text(max_size=5)).map("=".join) | st.text(max_size=9),
                max_size=3))  # fmt: skip
def test_no_override_whatever_raises_anything_else(overrides: list[str]) -> None:
    try:
        spec = loads(TEXT, overrides)
    except StudyFileError as error:
        assert error.mistakes
    else:
        assert StudySpec.model_validate_json(spec.stored()) == spec
