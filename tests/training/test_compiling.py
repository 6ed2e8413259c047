"""Compiled steps, when ``train.compile: auto`` takes them, and what happens where that fails.

One small network is really compiled, in a process of its own and with compiled code of its own.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Dataset
from sweeper.errors import MissingExtraError, UsageError
from sweeper.training import Compiling, prepare
from sweeper.training import ready as ready_module
from sweeper.training.compiling import (
    CompileError,
    Gain,
    decide,
    lacking,
    program,
    ready,
    recalled,
    remember,
)

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]
KEY = "program"


@dataclass
class Clockwork:
    """A step whose times are given."""

    eager_s: float = 0.1
    compiled_s: float = 0.08
    compile_s: float = 30.0
    error: str = ""
    compiled: bool = False
    compilations: int = 0
    timed: list[bool] = field(default_factory=list)

    def compile(self) -> float:
        if self.error:
            raise CompileError(self.error)
        self.compiled = True
        self.compilations += 1
        return self.compile_s

    def plain(self) -> None:
        self.compiled = False

    def step_s(self) -> float:
        self.timed.append(self.compiled)
        return self.compiled_s if self.compiled else self.eager_s


@pytest.fixture
def how(tmp_path: Path) -> Compiling:
    return Compiling(measured=tmp_path / "home" / "compiled.json", code=tmp_path / "compiled")


def test_few_steps_are_neither_timed_nor_compiled(how: Compiling) -> None:
    step = Clockwork()
    assert "199 steps" in decide(step, key=KEY, steps=199, how=how)
    assert not step.timed
    assert not how.measured.exists()


def test_too_little_training_costs_one_timing_and_the_next_trial_none(how: Compiling) -> None:
    step = Clockwork()
    assert "590 s of training" in decide(step, key=KEY, steps=5_900, how=how)
    assert (step.timed, step.compilations) == ([False], 0)
    assert "590 s of training" in decide(step, key=KEY, steps=5_900, how=how)
    assert len(step.timed) == 1


def test_trials_of_the_study_with_the_same_shapes_count_together(how: Compiling) -> None:
    together = Compiling(measured=how.measured, code=how.code, repeats=10)
    step = Clockwork()
    assert decide(step, key=KEY, steps=5_900, how=together).startswith("compiled in 30.0 s")
    assert step.compiled
    assert step.timed.count(True) == step.timed.count(False) - 1  # one decided whether to try


def test_what_is_no_faster_is_compiled_once_and_never_used(how: Compiling) -> None:
    step = Clockwork(compiled_s=0.099)
    expected = "not used: a step takes 100 ms without and 99 ms with it"
    assert decide(step, key=KEY, steps=10_000, how=how) == expected
    assert not step.compiled
    tried = step.compilations
    assert decide(step, key=KEY, steps=10**7, how=how) == expected
    assert step.compilations == tried


def test_later_trials_compile_where_they_save_more_than_it_takes(how: Compiling) -> None:
    remember(how.measured, KEY, Gain(eager_s=0.1, compiled_s=0.08, compile_s=30))
    step = Clockwork(compile_s=2.0)
    assert decide(step, key=KEY, steps=1_490, how=how) == (
        "not used: it would save 30 s and takes 30 s"
    )
    assert decide(step, key=KEY, steps=1_510, how=how).startswith("compiled in 2.0 s")
    assert (step.compiled, step.compilations, step.timed) == (True, 1, [])
    # Compiled code is kept: from now on it is what it takes with that.
    assert decide(step, key=KEY, steps=200, how=how).startswith("compiled in 2.0 s")


def test_a_model_that_cannot_be_compiled_is_tried_once(how: Compiling) -> None:
    step = Clockwork(error="no such thing")
    assert decide(step, key=KEY, steps=10_000, how=how) == "not used: no such thing"
    step.error = ""
    assert decide(step, key=KEY, steps=10_000, how=how) == "not used: no such thing"
    assert step.compilations == 0


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", '{"program": 3}', '{"program": {"eager_s": 0}}'),
        *('{"program": {"x": 1}}', '{"program": {"eager_s": "fast"}}'),
        '{"program": {"eager_s": 1, "failed": 7}}',
    ],
)
def test_a_broken_file_costs_a_measurement(content: str, how: Compiling) -> None:
    how.measured.parent.mkdir()
    how.measured.write_text(content)
    step = Clockwork()
    assert decide(step, key=KEY, steps=10_000, how=how).startswith("compiled")
    assert recalled(how.measured, KEY) == Gain(eager_s=0.1, compiled_s=0.08, compile_s=30)


def test_what_is_remembered_is_for_its_owner_only(how: Compiling) -> None:
    remember(how.measured, KEY, Gain(eager_s=1.0))
    remember(how.measured, "another", Gain(eager_s=2.0))
    assert stat.S_IMODE(how.measured.stat().st_mode) == 0o600
    assert recalled(how.measured, KEY) == Gain(eager_s=1.0)
    assert [file.name for file in how.measured.parent.iterdir()] == ["compiled.json"]


def test_a_file_that_cannot_be_written_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    how = Compiling(measured=tmp_path / "file" / "compiled.json", code=tmp_path / "code")
    assert decide(Clockwork(), key=KEY, steps=10_000, how=how).startswith("compiled")


def test_trials_share_a_program_where_only_values_differ(make_config: MakeConfig) -> None:
    shape = DataShape(1, 8, 8, 4)

    def of(**sections: Any) -> str:
        return program(make_config(**sections), shape, CPU)

    assert of() == of(optimizer={"name": "sgd", "lr": 1.0}, epochs=7, seed=3)
    assert of() != of(batch_size=16)
    assert of() != of(model={"name": "mlp", "width": 16, "layers": 1, "dropout": 0.1})
    assert of() != of(precision="float64")
    assert len({of(), of(label_smoothing=0.1), of(loss="mse")}) == 3


# --- real trials ------------------------------------------------------------------------------


def test_without_a_compiler_auto_trains_eagerly_and_on_says_what_is_missing(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    how: Compiling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(how.measured.parent))
    assert "is not found" in str(lacking(CPU))
    config = make_config(compile="auto")
    training = prepare(
        config, folder=Path(), device=CPU, dataset=make_dataset(config), compiling=how
    )
    assert training.notes["compile"].startswith("not used: torch.compile needs a compiler")
    assert len(list(training.epochs())) == 2
    config = make_config(compile="on")
    with pytest.raises(MissingExtraError, match=r"train\.compile: on .* install it, or use auto"):
        prepare(config, folder=Path(), device=CPU, dataset=make_dataset(config))


def test_a_compiler_that_fails_leaves_no_trace_in_auto_and_fails_the_trial_in_on(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    how: Compiling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("\n  inductor does not like this\nand says much more")

    monkeypatch.setattr(ready_module, "compiled", lambda *_: broken)
    monkeypatch.setattr("sweeper.training.compiling.TRY_S", {"cpu": 0.0})
    optimizer = {"name": "momentum", "lr": 0.1}
    auto, off = (
        make_config(optimizer=optimizer, compile=switch, epochs=3) for switch in ("auto", "off")
    )
    many = Compiling(measured=how.measured, code=how.code, repeats=1000)
    options = {"folder": Path(), "device": CPU, "dataset": make_dataset(auto)}
    training, eager = prepare(auto, compiling=many, **options), prepare(off, **options)
    assert training.notes["compile"] == (
        "not used: the model cannot be compiled: inductor does not like this"
    )
    assert losses(training) == losses(eager)
    with pytest.raises(UsageError, match=r"train\.compile: on cannot be done: .* use auto or off"):
        prepare(make_config(compile="on"), **options)


def losses(training: Any) -> list[float]:
    return [measurement.metrics["train_loss"] for measurement in training.epochs()]


RESTLESS = """
from torch import nn

class Restless(nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1  # which is built in: it is compiled anew for every batch
        return super().forward(x.flatten(1)) + self.calls

def make(shape, **arguments):
    return Restless(shape[0] * shape[1] * shape[2], shape[3])
"""


def test_a_model_that_torch_gives_up_on_does_not_end_compiling_for_others(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "restless_model.py").write_text(RESTLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []

    def traced(graph: Any, _: Any) -> Any:
        seen.append(1)
        return graph

    def compiled(function: Any, _: torch.device) -> Any:
        return torch.compile(function, dynamic=False, backend=traced)

    monkeypatch.setattr(ready_module, "compiled", compiled)

    def graphs_of(model: dict[str, Any]) -> int:
        seen.clear()
        config = make_config(model, compile="on", epochs=12)
        training = prepare(config, folder=Path(), device=CPU, dataset=make_dataset(config))
        list(training.epochs())
        return len(seen)

    assert graphs_of({"name": "mlp", "width": 12, "layers": 1}) == 1
    assert graphs_of({"name": "restless_model:make"}) > 5
    assert graphs_of({"name": "mlp", "width": 13, "layers": 1}) == 1


def test_memory_that_does_not_suffice_is_no_failure_of_the_compiler(how: Compiling) -> None:
    with pytest.raises(MemoryError), ready(how.code):
        raise MemoryError


def test_what_the_compiler_met_is_told_not_who_met_it(how: Compiling) -> None:
    """dynamo wraps it in one that begins with "backend='inductor' raised:"."""

    def wrapped(inner: Exception) -> BackendCompilerFailed:
        return BackendCompilerFailed(lambda *_: None, inner, None)

    with pytest.raises(CompileError, match="no such operation"), ready(how.code):
        raise wrapped(wrapped(ValueError("no such operation")))
    with pytest.raises(torch.OutOfMemoryError, match="50 MiB"), ready(how.code):
        raise wrapped(torch.OutOfMemoryError("tried to allocate 50 MiB"))


def test_advice_of_the_compiler_is_no_failure_of_it(how: Compiling) -> None:
    """Warnings are errors in here, and it warns on every newer GPU."""
    with ready(how.code):
        warnings.warn_explicit("TensorFloat32", UserWarning, "x.py", 1, module="torch._inductor.x")
    with pytest.raises(CompileError), ready(how.code):
        warnings.warn_explicit("a model's own", UserWarning, "x.py", 1, module="a_model")


COMPILED = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from training.conftest import SHAPE, stripes
from sweeper.config import TrialConfig
from sweeper.data import Augment, Dataset, Standardize
from sweeper.training import Compiling, compiling, prepare

home = Path(sys.argv[1])
part = stripes(70, SHAPE, 0)
data = Dataset(
    name="stripes", source="", shape=SHAPE, classes=tuple("abcd"), train=part, val=part, test=part,
    standardize=Standardize.fit(part.images, "channel"), augment=Augment(()), digest="",
)

def ready(switch, folder="home"):
    config = TrialConfig.model_validate({{
        "data": {{"name": "digits"}},
        "model": {{"name": "mlp", "width": 16, "layers": 1, "norm": "batch", "dropout": 0.25}},
        "optimizer": {{"name": "adam", "lr": 0.0078125}},
        "train": {{"epochs": 4, "batch_size": 32, "precision": "float64", "compile": switch}},
    }})
    file = home / folder / "compiled.json"
    if folder == "home" and not file.exists():
        key = compiling.program(config, SHAPE, torch.device("cpu"))
        gain = compiling.Gain(eager_s=2.0, compiled_s=1.0, compile_s=1.0)
        compiling.remember(file, key, gain)
    how = Compiling(measured=file, code=home / "compiled", repeats=1000)
    return prepare(config, folder=Path(), device=torch.device("cpu"), dataset=data, compiling=how)

def losses(training):
    return [[m.metrics[name] for name in ("train_loss", "val_loss")] for m in training.epochs()]

auto = ready("auto")
found = {{"auto": losses(auto), "note": auto.notes["compile"]}}
if sys.argv[2] == "all":
    begun = ready("auto")
    epochs = begun.epochs()
    next(epochs), next(epochs)
    resumed = ready("auto")
    resumed.load_state_dict(begun.state_dict())
    found["resumed"] = found["auto"][:2] + losses(resumed)
    found["on"], found["off"] = losses(ready("on")), losses(ready("off"))
    compiling.TRY_S = {{"cpu": 0.0}}
    measured = ready("auto", "unknown")
    found["measured"], found["measured_note"] = losses(measured), measured.notes["compile"]
print(json.dumps(found))
"""


def run_compiled(home: Path, what: str) -> dict[str, Any]:
    """Train in a new process: within one torch remembers what it compiled."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.format(tests=str(tests)), str(home), what],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def binaries(folder: Path) -> dict[str, int]:
    """What the compiler has made, and when."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*.so")}


@pytest.mark.skipif(lacking(CPU) is not None, reason=f"it cannot be compiled here: {lacking(CPU)}")
def test_compiled_trials_equal_eager_ones_and_the_next_worker_finds_the_code(
    tmp_path: Path,
) -> None:
    """Known to repay, measured first, by order, and resumed half way; with dropout."""
    home = tmp_path / "home"
    first = run_compiled(home, "all")
    for name in ("auto", "resumed", "on", "measured"):
        for mine, theirs in zip(first[name], first["off"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9), name
    assert "a step takes" in first["measured_note"]
    assert first["note"].startswith("compiled in")
    assert stat.S_IMODE((home / "compiled").stat().st_mode) == 0o700
    built = binaries(home / "compiled")
    assert built
    second = run_compiled(home, "auto")
    assert second["auto"] == first["auto"]
    assert second["note"].startswith("compiled in")
    assert binaries(home / "compiled") == built
