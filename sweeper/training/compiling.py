"""``torch.compile`` of the training step: whether it repays, and what it needs.

``train.compile: auto`` compiles a structure only where that repays on this device. What it goes by
is measured once and remembered in the home folder, by the program that is compiled (model, shapes,
batch, precision), device and torch's version:

1. Too few steps with these shapes to repay anything: nothing is even measured.
2. Nothing known: one eager step is timed. If all the steps with these shapes take less than
   :data:`TRY_S` together, compiling is not tried.
3. Else the step is compiled, and timed against the eager one in turn. The trial that measured
   trains with what was faster.
4. What is known: compiled where the seconds saved are more than the seconds that compiling took.

A trial alone is compiled from its first step to its last or not at all; what was tried before
leaves no trace. In a cohort the common step is, for the number of members that it has; in lanes
``auto`` compiles nothing. Compiled kernels round differently, so the same seed gives the same
numbers within rounding, not bit for bit: where that is asked for, ``off`` is the right value, and
it is the default.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.errors import MissingExtraError, SweeperError, UsageError
from sweeper.private import private_folder
from sweeper.provenance import cpu_name
from sweeper.training import remembered
from sweeper.training.rows import fits

_log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

FEWEST_STEPS: Final = 200
"""With fewer steps even timing one of them would be noticed."""
TRY_S: Final = {"cpu": 600.0, "cuda": 120.0}
"""From so much training on compiling is tried. On a CPU it takes 20 to 60 s (on a shared core) and
saves a tenth or so; on an H100 it takes 7 to 30 s and saves a sixth to a half."""
WORTH: Final = 1.03
"""A compiled step has to be so many times as fast: less is within the error of the measurement."""
_ROUNDS: Final = 3
_RECOMPILATIONS: Final = 1024
"""torch gives up on a model after 8 variants in a process; a worker trains many structures."""


_OPTIONS: Final[dict[str, Any]] = {"fallback_random": True}
_OPTIONS_OF: Final[dict[str, dict[str, Any]]] = {"cuda": {"combo_kernels": True}}
"""In a CUDA graph every kernel takes 2 to 4 µs, however small: independent ones become one."""

_FOLDER: Final = "TORCHINDUCTOR_CACHE_DIR"


class CompileError(SweeperError):
    """The model cannot be compiled."""


class NoRoomError(CompileError):
    """There is not enough memory to compile it now; there may be another time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiling:
    """What ``train.compile`` goes by in a worker.

    ``measured`` is the file with what compiling gave and cost, ``code`` the folder with compiled
    code that all workers of a home share, and ``repeats`` the number of trials of the study that
    run the very same program, this one included. ``together`` is the number of those that fit into
    one cohort, where rates of dropout are no part of the program.
    """

    measured: Path
    code: Path
    repeats: int = 1
    together: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Seconds of a step, eager and compiled, and of compiling; 0 where compiling was not tried.

    ``failed``: why it could not be compiled, or nothing.
    """

    eager_s: float
    compiled_s: float = 0.0
    compile_s: float = 0.0
    failed: str = ""


class Rehearsed(Protocol):
    """A training step that can be tried without leaving a trace."""

    def compile(self) -> float:
        """Let it run compiled from now on; the seconds until it is ready. Raises CompileError."""

    def plain(self) -> None:
        """Let it run without compiled code again."""

    def step_s(self) -> float:
        """Seconds of one step as it runs now."""


def decide(
    step: Rehearsed, *, key: str, steps: int, how: Compiling, device_type: str = "cpu"
) -> str:
    """Compile ``step`` where that repays (``train.compile: auto``); what came of it.

    ``steps``: how many this trial has. Deterministic, given what the file remembers.
    """
    total = steps * how.repeats
    if total < FEWEST_STEPS:
        return f"not used: {total} steps with these shapes are too few to repay it"
    gain = recalled(how.measured, key)
    if gain is None or not (gain.failed or gain.compiled_s):
        try_s = TRY_S.get(device_type, TRY_S["cpu"])
        return _first(step, gain, key=key, total=total, how=how, try_s=try_s)
    if gain.failed:
        return f"not used: {gain.failed}"
    if reason := _not_worth(gain):
        return reason
    saved_s = (gain.eager_s - gain.compiled_s) * total
    if saved_s <= gain.compile_s:
        return f"not used: it would save {saved_s:.0f} s and takes {gain.compile_s:.0f} s"
    try:
        gain = replace(gain, compile_s=step.compile())
    except CompileError as error:
        _log.warning("train.compile: auto trains without: %s", error)
        return f"not used: {error}"
    remember(how.measured, key, gain)
    return _compiled(gain)


def _first(
    step: Rehearsed, gain: Gain | None, *, key: str, total: int, how: Compiling, try_s: float
) -> str:
    """Nobody has compiled this program here: time it, and try if there is enough to train."""
    if gain is None:
        gain = Gain(eager_s=step.step_s())
        remember(how.measured, key, gain)
    work_s = gain.eager_s * total
    if work_s < try_s:
        return (
            f"not used: {work_s:.0f} s of training with these shapes; it is tried from "
            f"{try_s:.0f} s on"
        )
    try:
        gain = _compared(step)
    except CompileError as error:
        if not isinstance(error, NoRoomError):
            remember(how.measured, key, replace(gain, failed=str(error)))
        _log.warning("train.compile: auto trains without: %s", error)
        return f"not used: {error}"
    remember(how.measured, key, gain)
    reason = _not_worth(gain)
    if reason is None:
        step.compile()
    return reason or _compiled(gain)


def _compared(step: Rehearsed) -> Gain:
    """Compiled and eager steps timed in turn, so that what else the machine does hits both."""
    compile_s = step.compile()
    compiled, eager = [], []
    for _ in range(_ROUNDS):
        step.compile()
        compiled.append(step.step_s())
        step.plain()
        eager.append(step.step_s())
    return Gain(eager_s=min(eager), compiled_s=min(compiled), compile_s=compile_s)


def _not_worth(gain: Gain) -> str | None:
    if gain.eager_s >= gain.compiled_s * WORTH:
        return None
    return f"not used: {_steps(gain)}"


def _compiled(gain: Gain) -> str:
    return f"compiled in {gain.compile_s:.1f} s: {_steps(gain)}"


def _steps(gain: Gain) -> str:
    eager_ms, compiled_ms = gain.eager_s * 1e3, gain.compiled_s * 1e3
    return f"a step takes {eager_ms:.3g} ms without and {compiled_ms:.3g} ms with it"


# --- compiling --------------------------------------------------------------------------------


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """``function`` of tensors on ``device`` through ``torch.compile``; compiled when it is first
    called, see :func:`ready`.

    Shapes are taken as they are, also where a process meets several. Dropout draws what it draws
    eagerly, so a seed means the same trial with and without.
    """
    options = {**_OPTIONS, **_OPTIONS_OF.get(device.type, {})}
    faster: Callable[P, T] = torch.compile(function, dynamic=False, options=options)
    return faster


_CODES: Final[dict[type, CodeType]] = {}


def of_its_own(method: Callable[P, T], kind: type) -> Callable[P, T]:
    """A bound ``method`` with code that is shared among those of this ``kind`` only.

    What torch has compiled belongs to a code object, and so do its limits: a model for which it
    gives up, as it changes with every batch, is not to end compiling for all others.
    """
    assert isinstance(method, MethodType)
    function = method.__func__
    code = _CODES.setdefault(kind, function.__code__.replace())
    own = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    return MethodType(own, method.__self__)


@contextlib.contextmanager
def ready(code: Path | None) -> Iterator[None]:
    """Compile in here. Compiled code is kept in ``code``, for the owner's eyes only.

    Another folder that ``TORCHINDUCTOR_CACHE_DIR`` names goes first. Raises CompileError, with the
    first line of what the compiler said; memory that does not suffice is raised as it is. Its
    advice is not asked for: on newer GPUs it warns that float32 is not TensorFloat32.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # loads for seconds

    # The only way to tell inductor. It writes its default there itself, as soon as it is loaded.
    if code is not None and os.environ.get(_FOLDER) in {None, default_cache_dir()}:
        os.environ[_FOLDER] = str(code)
    try:
        if code is not None:
            private_folder(code)
        with (
            warnings.catch_warnings(),
            torch._dynamo.config.patch(
                recompile_limit=_RECOMPILATIONS, accumulated_recompile_limit=_RECOMPILATIONS
            ),
        ):
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            # what torch 2.11 says of itself as it traces; an error where all warnings are
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    except Exception as error:
        cause = _what_the_compiler_met(error)
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise CompileError(f"the model cannot be compiled: {_first_line(cause)}") from error


def lacking(device: torch.device) -> str | None:
    """What compiling for ``device`` needs and this machine lacks, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs the package triton for a GPU, but it is not installed"
        names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    else:
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if any(name and shutil.which(name.split()[0]) for name in names):
        return None
    return f"torch.compile needs a compiler, but {' or '.join(filter(None, names))} is not found"


def required(device: torch.device) -> None:
    """Raises MissingExtraError where ``train.compile: on`` cannot work for want of a program."""
    if reason := lacking(device):
        raise MissingExtraError(
            f"train.compile: on cannot be done: {reason}; install it, or use auto or off"
        )


def refused(error: CompileError) -> UsageError:
    """What a trial with ``train.compile: on`` fails by."""
    return UsageError(f"train.compile: on cannot be done: {error}; use auto or off")


def _what_the_compiler_met(error: BaseException) -> BaseException:
    """What is wrong; dynamo wraps what its backend raises, and keeps it in an attribute."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    return error


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


# --- what is remembered -----------------------------------------------------------------------


def program(config: TrialConfig, shape: DataShape, device: torch.device) -> str:
    """A text that two trials share if they run the same compiled code on the same kind of device.

    Initial weights and data change none of it, and the optimizer only whether weights are in rows;
    rates of dropout and of label smoothing are built in.
    """
    train = config.train
    what = {
        "model": config.model.model_dump(mode="json", exclude={"init"}),
        "shape": list(shape),
        "loss": [train.loss, train.label_smoothing],
        "batch_size": train.batch_size,
        "precision": train.precision,
        "rows": device.type == "cuda" and fits(config),
        "graph": train.graph,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{digest} {name} torch {torch.__version__} {remembered.STEP}"


def recalled(file: Path, key: str) -> Gain | None:
    """What is remembered of ``key``; None where that is nothing, or nothing that makes sense."""
    found = remembered.read(file).get(key)
    try:
        gain = Gain(**found) if isinstance(found, dict) else None
        sound = gain is not None and gain.eager_s > 0 <= gain.compiled_s and gain.compile_s >= 0
    except TypeError:
        return None
    return gain if sound and gain is not None and isinstance(gain.failed, str) else None


def remember(file: Path, key: str, gain: Gain) -> None:
    """Keep it in ``file``; a file that cannot be written is no harm."""
    remembered.keep(file, key, asdict(gain))
