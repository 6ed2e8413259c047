"""Rows of weights: where a parameter lies, what a step reads of it, and the update rules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from trial_bench import MODELS, Bench, MakeConfig, MakeDataset, assert_equal, varied

from sweeper.config.optimizer import OptimizerConfig
from sweeper.measurement import Measurement
from sweeper.optim import make_optimizer
from sweeper.training import rows, update
from sweeper.training.base import Training
from sweeper.training.cohort import engine as cohort_engine
from sweeper.training.engine import Engine
from sweeper.training.loop import NetworkTraining
from sweeper.training.precision import precision_of
from sweeper.training.rows import RULES, fits, numbers, optimizer
from sweeper.training.rows.leaves import Gradient, Leaves, lowered_parameters
from sweeper.training.rows.numbers import Layout, Numbers, inputs_first, kernels_like_images
from sweeper.training.rows.optimizer import RowOptimizer

CPU = torch.device("cpu")

SECTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "sgd, decayed": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01},
    "momentum": {"name": "momentum", "lr": 0.05, "momentum": 0.8, "weight_decay": 1e-3},
    "no momentum": {"name": "momentum", "lr": 0.05, "momentum": 0.0},
    "nesterov": {"name": "nesterov", "lr": 0.05, "weight_decay": 1e-3, "clip_norm": 0.5},
    "no nesterov": {"name": "nesterov", "lr": 0.05, "momentum": 0.0},
    "adam": {"name": "adam", "lr": 0.02, "momentum": 0.3, "beta2": 0.9, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "clip_norm": 2.0},
}


@pytest.fixture
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The one-kernel update, run by Triton's interpreter."""
    pytest.importorskip("triton", reason="this torch came without Triton")
    name = "sweeper.training.rows.fused"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name], rows.fused  # nobody else is to find it


LOWERED = {
    "nothing": frozenset[str](),
    "weights": frozenset({"0.weight", "1.weight"}),
    "everything": frozenset({"0.weight", "0.bias", "1.weight", "1.bias"}),
}


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
@pytest.mark.parametrize("lowered", LOWERED)
def test_the_update_in_one_kernel_is_that_of_torch(
    lowered: str, triton_on_the_cpu: ModuleType
) -> None:
    rules_are_those_of_torch(triton_on_the_cpu.update, LOWERED[lowered])


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
@pytest.mark.parametrize("large", [16, 17])
@pytest.mark.parametrize("lowered", ["weights", "everything"])
def test_a_large_gradient_is_not_joined_with_the_others(
    lowered: str, large: int, triton_on_the_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights, or the first of two only; and where there is nothing else."""
    monkeypatch.setattr(numbers, "LARGE", len(SECTIONS) * large)
    apart = 2 if large == 16 else 1
    for fused in (triton_on_the_cpu.update, None):
        rules_are_those_of_torch(fused, LOWERED[lowered], apart=apart)
        rules_are_those_of_torch(fused, LOWERED["weights"], apart=apart, bias=False)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # set where it is called
@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")])
def test_the_kernel_compiles_for_a_gpu(
    dtypes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's interpreter takes what its compiler does not. No GPU is needed for that."""
    triton = pytest.importorskip("triton", reason="this torch came without Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fused: Any = importlib.import_module("sweeper.training.rows.fused")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weights, lowered = dtypes
    kinds = {
        **dict.fromkeys(["lowered", "lowered_gradient"], f"*{lowered}"),
        **dict.fromkeys(["steps", "lr", "beta1", "beta2"], "*fp64"),
        **dict.fromkeys(["is_adam", "is_nesterov"], "*i1"),
        **dict.fromkeys(["start", "stop", "gradient_width", "size", "lowered_size"], "i32"),
        "block": "constexpr",
    }
    source = ASTSource(
        fn=fused._update,
        signature={name: kinds.get(name, f"*{weights}") for name in fused._update.arg_names},
        constexprs={"block": 1024},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "st.global" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@pytest.mark.parametrize("lowered", LOWERED)
def test_every_rule_is_that_of_torch(lowered: str) -> None:
    rules_are_those_of_torch(None, LOWERED[lowered])


def rules_are_those_of_torch(
    fused: Any, lowered: frozenset[str], *, apart: int = 0, bias: bool = True
) -> None:
    """Ten steps of all rules at once, with gradients of every size, against torch.optim.

    What is lowered has gradients in float32 here, and the weights are float64.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    if apart:  # which leave no gap
        model = nn.Sequential(nn.Linear(8, 4, bias=bias), nn.Linear(4, 4, bias=bias)).double()
    layout = Layout.of(model, lowered=lowered)
    assert len(layout.apart(len(SECTIONS))) == apart
    configs = [OptimizerConfig.model_validate(section) for section in SECTIONS.values()]
    twins = [[p.detach().clone().requires_grad_() for p in model.parameters()] for _ in configs]
    optimizers = [make_optimizer(c, twin) for c, twin in zip(configs, twins, strict=True)]
    for each in optimizers:  # the versions whose operations are the reference
        for group in each.param_groups:
            group["fused"], group["foreach"] = None, False
    row = Numbers.stacked([Numbers.initial(model, layout) for _ in configs])
    leaves = Leaves(row.weights, layout, torch.float32)
    ours = RowOptimizer(len(configs), dtype=torch.float64, device=CPU, fused=fused)
    for step in range(10):
        lrs = [config.lr * 0.9**step for config in configs]
        ours.configure(configs, lrs)
        scale = 10.0 ** (step - 5)
        named = {name: torch.randn_like(leaf.detach()) for name, leaf in leaves.named.items()}
        zeros = torch.zeros(16 * len(configs), dtype=torch.float64)
        large = [layout.flat(name, named.pop(name)) for name in layout.apart(len(configs))]
        lowered_part, kept_part = layout.joined(
            named, zeros.float(), zeros, rows=torch.Size([len(configs)])
        )
        gradient = Gradient(
            lowered=lowered_part * scale,
            kept=kept_part * scale,
            apart=tuple(part * scale for part in large),
        )
        ours.update(row, gradient, leaves)
        assert torch.equal(leaves.lowered, row.weights[:, : layout.lowered_size].float())
        for k, (each, config) in enumerate(zip(optimizers, configs, strict=True)):
            named = layout.named(gradient.whole()[k])
            for parameter, of_parameter in zip(twins[k], named.values(), strict=True):
                parameter.grad = of_parameter.clone()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(twins[k], config.clip_norm)
            for group in each.param_groups:
                group["lr"] = lrs[k]
            each.step()
    for k, name in enumerate(SECTIONS):
        found = torch.cat([each.flatten() for each in layout.named(row.weights[k]).values()])
        expected = torch.cat([parameter.detach().flatten() for parameter in twins[k]])
        torch.testing.assert_close(
            found, expected, rtol=1e-13, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stored", [False, True])
def test_every_parameter_begins_where_kernels_like_to_read(stored: bool) -> None:
    """For each of several models; what lies between is zero, and stays it."""
    model = nn.Sequential(nn.Linear(7, 3), nn.LayerNorm(3), nn.Conv2d(3, 5, 3), nn.Linear(16, 5))
    layout = Layout.of(
        model,
        lowered=frozenset({"0.weight", "0.bias", "3.weight"}),
        stored={**kernels_like_images(model), **inputs_first(model)} if stored else None,
    )
    assert list(layout.places)[:3] == ["3.weight", "0.weight", "0.bias"]
    assert layout.lowered_size == 32 + 16 + 80
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    numbers = Numbers.stacked([Numbers.of_state(state, layout) for state in states])
    leaves = Leaves(numbers.weights, layout, torch.bfloat16)
    for leaf in leaves.named.values():
        assert all(leaf[k].data_ptr() % 32 == 0 for k in range(3))
    for k, state in enumerate(states):
        named = layout.named(numbers.weights[k])
        assert list(named) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in named.items())
        assert torch.equal(layout.row(named), numbers.weights[k])
    loss = torch.stack([leaf.float().square().sum() for leaf in leaves.named.values()]).sum()
    whole = leaves.gradient(loss).whole()
    torch.testing.assert_close(whole, 2 * numbers.weights, rtol=1e-2, atol=0)
    assert layout.trained == sum(value.numel() for value in states[0].values())
    assert (whole != 0).sum() <= 3 * layout.trained < whole.numel()


@pytest.mark.parametrize("model", MODELS)
def test_what_autocast_casts_may_be_cast_beforehand(
    model: str, make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with a member that leaves and one that follows. Biases are left out here:
    under vmap autocast does not cast them."""
    bench = Bench(make_config, make_dataset)
    configs = [
        bench.config(
            index, varied(index, name, clip_norm=None), MODELS[model], precision="bfloat16"
        )
        for index, name in enumerate(["adamw", "sgd", "nesterov", "adam"])
    ]

    def of_cohort() -> list[dict[str, torch.Tensor]]:
        cohort = bench.cohort(configs[0])
        members = [cohort.join(config) for config in configs[:3]]
        cohort.epoch()
        states = [members[0].state_dict()["engine"]["model"]]
        members.pop(0).close()
        members.append(cohort.join(configs[3]))
        cohort.epoch()
        lowered.append(cohort._open().layout.lowered_size)
        return states + [member.state_dict()["engine"]["model"] for member in members]

    def weights(*args: Any) -> frozenset[str]:
        return frozenset(name for name in lowered_parameters(*args) if name.endswith("weight"))

    lowered: list[int] = []
    monkeypatch.setattr(cohort_engine, "lowered_parameters", weights)
    beforehand = of_cohort()
    monkeypatch.setattr(cohort_engine, "lowered_parameters", lambda *_: frozenset())
    at_every_step = of_cohort()
    assert lowered[0] > lowered[1] == 0
    torch.testing.assert_close(beforehand, at_every_step, rtol=0, atol=0)


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


@pytest.fixture
def in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the kernel."""
    monkeypatch.setattr(update, "in_rows", lambda *_: True)


def trained(training: Training) -> list[Measurement]:
    return list(training.epochs())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", sorted(RULES))
def test_a_trial_in_rows_gets_what_torchs_optimizers_give(
    model: str, optimizer: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench.config(1, varied(1, optimizer, schedule="cosine"), MODELS[model])
    usual = bench.alone(config)
    expected = trained(usual)
    monkeypatch.setattr(update, "in_rows", lambda *_: True)
    ours = bench.alone(config)
    assert isinstance(engine_of(ours)._step.update, update.RowUpdate)
    assert ours.parameters == usual.parameters
    assert_equal(ours, trained(ours), usual, expected)


def engine_of(training: Training) -> Engine:
    assert isinstance(training, NetworkTraining)
    assert training._engine is not None
    return training._engine


@pytest.mark.usefixtures("in_rows")
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_a_step_with_large_gradients_is_the_same_step(
    model: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a cohort, which joins gradients of its own."""
    config = bench.config(
        1, varied(1, "adamw", clip_norm=None), MODELS[model], precision="bfloat16"
    )

    def states() -> list[Any]:
        alone, cohort = bench.alone(config), bench.cohort(config)
        member = cohort.join(config)
        trained(alone)
        cohort.epoch()
        return [alone.state_dict()["engine"], member.state_dict()["engine"]]

    usual = states()
    monkeypatch.setattr(numbers, "LARGE", 1)
    joined: list[int] = []
    original = Layout.joined

    def counted(
        layout: Layout, named: dict[str, torch.Tensor], *zeros: torch.Tensor, rows: torch.Size
    ) -> Any:
        joined.append(len(layout.places) - len(named))
        return original(layout, named, *zeros, rows=rows)

    monkeypatch.setattr(Layout, "joined", counted)
    large = states()
    assert max(joined) > 0
    torch.testing.assert_close(large, usual, rtol=0, atol=0)


@pytest.mark.parametrize("first_in_rows", [True, False])
@pytest.mark.parametrize("optimizer", sorted(RULES))
def test_a_checkpoint_goes_on_in_rows_and_out_of_them(
    optimizer: str, first_in_rows: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels of convolutions lie in rows as the images do."""
    config = bench.config(3, varied(3, optimizer), MODELS["cnn"])
    whole = bench.alone(config)
    expected = trained(whole)
    monkeypatch.setattr(update, "in_rows", lambda *_: first_in_rows)
    half = bench.alone(config)
    epochs = half.epochs()
    begun = [next(epochs)]
    state = half.state_dict()
    monkeypatch.setattr(update, "in_rows", lambda *_: not first_in_rows)
    other = bench.alone(config)
    other.load_state_dict(state)
    assert_equal(other, begun + trained(other), whole, expected)


@pytest.mark.usefixtures("in_rows")
@pytest.mark.parametrize("model", MODELS)
def test_a_trial_may_have_cast_beforehand_what_autocast_casts(
    model: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and where the model is evaluated its own weights are the new ones."""
    section = varied(1, "adamw", clip_norm=None)  # a norm adds in another order
    config = bench.config(1, section, MODELS[model], precision="bfloat16")
    beforehand = bench.alone(config)
    measured = trained(beforehand)
    monkeypatch.setattr(update, "lowered_parameters", lambda *_: frozenset())
    at_every_step = bench.alone(config)
    expected = trained(at_every_step)
    assert [each.metrics["val_loss"] for each in measured] == [
        each.metrics["val_loss"] for each in expected
    ]
    torch.testing.assert_close(
        beforehand.state_dict()["engine"], at_every_step.state_dict()["engine"], rtol=0, atol=0
    )


@pytest.mark.usefixtures("in_rows")
def test_parameters_stay_views_of_the_row_and_kernels_lie_channels_last(bench: Bench) -> None:
    config = bench.config(1, varied(1, "adam"), MODELS["cnn"], precision="float32")
    training = bench.alone(config)
    before = engine_of(training).model.state_dict()
    address = next(iter(before.values())).untyped_storage().data_ptr()
    epochs = training.epochs()
    next(epochs)
    training.load_state_dict(training.state_dict())
    model = engine_of(training).model
    for parameter in model.parameters():
        assert parameter.untyped_storage().data_ptr() == address
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("in_rows")
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_trial_in_rows_can_be_compiled(precision: str, bench: Bench) -> None:
    """In bfloat16 for one epoch of few steps: later ones drift apart by rounding."""
    pytest.importorskip("torch._inductor")
    options = {"float64": {}, "bfloat16": {"epochs": 1, "batch_size": 100}}[precision]
    section = varied(0, "adamw") if precision == "float64" else {"name": "sgd", "lr": 1e-3}
    config = bench.config(0, section, MODELS["mixer"], compile="on", precision=precision, **options)
    compiled = bench.alone(config)
    assert compiled.notes["compile"].startswith("compiled in")
    plain = config.train.model_copy(update={"compile": "off"})
    eager = bench.alone(config.model_copy(update={"train": plain}))
    found, expected = trained(compiled), trained(eager)
    if precision == "float64":
        assert_equal(compiled, found, eager, expected)
    for metric in ("train_loss", "val_loss"):
        assert found[0].metrics[metric] == pytest.approx(expected[0].metrics[metric], rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_come_as_they_lie_in_a_row(
    model: str, precision: str, bench: Bench, in_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a cohort: not one is turned round before they are joined."""
    config = bench.config(0, varied(0, "adam"), MODELS[model], precision=precision, epochs=1)
    seen: list[str] = []
    original = Layout.joined

    def joined(
        layout: Layout, named: dict[str, torch.Tensor], *zeros: torch.Tensor, rows: torch.Size
    ) -> Any:
        for name, value in named.items():
            seen.append(name)
            assert layout.flat(name, value).data_ptr() == value.data_ptr(), name
        return original(layout, named, *zeros, rows=rows)

    cohort, alone = bench.cohort(config), bench.alone(config)
    cohort.join(config)
    cohort.join(config)
    cohort._settle(cohort._open())
    monkeypatch.setattr(Layout, "joined", joined)
    trained(alone)
    of_one = len(seen)
    assert of_one
    cohort.epoch()
    assert len(seen) == 2 * of_one


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("model", MODELS)
def test_the_kernel_is_tried_with_arguments_as_those_of_a_step(
    model: str,
    precision: str,
    bench: Bench,
    in_rows: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Triton builds a kernel for: dtypes, and which addresses and numbers 16 divides."""
    pytest.importorskip("triton", reason="this torch came without Triton")
    fused: Any = importlib.import_module("sweeper.training.rows.fused")
    kinds: list[dict[str, Any]] = []

    class Spy:
        def __getitem__(self, _: Any) -> Any:
            return lambda **arguments: kinds.append(
                {name: kind(value) for name, value in arguments.items()}
            )

    def kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0, value.is_contiguous()
        return type(value), value % 16 == 0, value == 1

    monkeypatch.setattr(fused, "_update", Spy())
    monkeypatch.setattr(update, "fused_update", lambda *_: fused.update)
    monkeypatch.setattr(cohort_engine, "fused_update", lambda *_: fused.update)
    config = bench.config(1, varied(1, "adam"), MODELS[model], precision=precision, epochs=1)
    of = precision_of(config.train, CPU)
    optimizer._try(fused.update, CPU, of.dtype, of.of_products)
    (tried,) = kinds
    trained(bench.alone(config))
    for members in (1, 3):
        cohort = bench.cohort(config)
        for _ in range(members):
            cohort.join(config)
        cohort.epoch()
    assert len(kinds) > 3
    assert all(each == tried for each in kinds)


def test_rows_are_for_a_gpu_and_for_what_they_have_rules_for(make_config: MakeConfig) -> None:
    assert fits(make_config())
    assert not update.in_rows(make_config(), precision_of(make_config().train, CPU))
    for other in (
        make_config({"name": "resnet18"}),
        make_config(optimizer={"name": "rmsprop"}),
        make_config(precision="float16"),
        make_config(layer_statistics=True),
    ):
        assert not fits(other)


@pytest.mark.parametrize(
    "error", [MemoryError("CUDA: out of memory"), torch.OutOfMemoryError("no")]
)
def test_memory_that_does_not_suffice_is_not_held_against_the_kernel(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="this torch came without Triton")

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(optimizer, "lacking", lambda _: None)
    optimizer.fused_update.cache_clear()
    asked = torch.device("cuda"), torch.float32, torch.bfloat16
    try:
        monkeypatch.setattr(optimizer, "_try", broken)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.fused_update(*asked)
        monkeypatch.setattr(optimizer, "_try", lambda *_: None)
        assert optimizer.fused_update(*asked) is not None
    finally:
        optimizer.fused_update.cache_clear()


@pytest.mark.parametrize("error", [RuntimeError("no libcuda\nand more"), OSError("read-only")])
def test_a_kernel_that_cannot_be_built_is_done_without(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever Triton lacks on this machine, a trial trains as torch trains it."""
    pytest.importorskip("triton", reason="this torch came without Triton")

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(optimizer, "lacking", lambda _: None)
    monkeypatch.setattr(optimizer, "_try", broken)
    optimizer.fused_update.cache_clear()
    try:
        cuda = torch.device("cuda")
        for _ in range(2):
            assert optimizer.fused_update(cuda, torch.float32, torch.bfloat16) is None
    finally:
        optimizer.fused_update.cache_clear()
    (record,) = caplog.records
    assert record.message.endswith("no kernel for that: " + str(error).split("\n")[0])


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trying_the_kernel_works_where_the_kernel_does(
    dtype: torch.dtype, triton_on_the_cpu: ModuleType
) -> None:
    lowered = {torch.float32: torch.bfloat16}.get(dtype, dtype)
    optimizer._try(triton_on_the_cpu.update, CPU, dtype, lowered)
