"""Lanes on a real GPU: trials on streams of their own, captured and eager, against trials alone."""

from __future__ import annotations

import pytest
import torch
from gpu_bench import MODELS, Bench, MakeConfig, MakeDataset

from sweeper.config import TrialConfig
from sweeper.training import best_device
from sweeper.training.capture import CapturedStep, _waiting_forbidden
from sweeper.training.cohort.rules import Way
from sweeper.training.crew import Crew
from sweeper.training.device import repeatable
from sweeper.training.lanes import Lane
from sweeper.training.loop import NetworkTraining
from sweeper.training.network import NetworkTrial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


class Squad:
    """A crew on the GPU."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.crew = Crew(best_device())

    def join(self, config: TrialConfig, way: Way = "streams") -> NetworkTrial:
        return self.crew.join(config, dataset=self._bench.dataset(config), way=way)

    def to_the_end(self) -> None:
        """Each is compared while the others have work queued."""
        while self.crew.members:
            self.crew.epoch()
            for member in self.crew.members:
                if member.finished:
                    self._bench.assert_as_alone(member)
                    member.close()
            self.crew.tidy()


@pytest.fixture
def squad(bench: Bench) -> Squad:
    return Squad(bench)


@pytest.mark.parametrize("way", ["streams", "cohort"])
@pytest.mark.parametrize("graph", ["on", "off"])
def test_all_structures_side_by_side_get_what_they_get_alone(
    graph: str, way: Way, bench: Bench, squad: Squad
) -> None:
    for index, model in enumerate(MODELS.values()):
        squad.join(bench.config(index, model, dropout=0.1 + 0.1 * index, graph=graph), way)
    squad.to_the_end()


def test_equal_structures_draw_from_streams_of_their_own(bench: Bench, squad: Squad) -> None:
    """Eight with the same kernels, whose dropout and augmentation would mix at once."""
    for seed in range(8):
        squad.join(bench.config(3, MODELS["mlp"], dropout=0.5, graph="on", seed=seed))
    squad.to_the_end()


def test_capture_and_checkpoint_while_others_have_work_queued(bench: Bench, squad: Squad) -> None:
    first = squad.join(bench.config(1, MODELS["cnn"], dropout=0.2, graph="on", epochs=3))
    squad.join(bench.config(2, MODELS["mixer"], dropout=0.1, graph="on", batch_size=8))
    squad.crew.epoch()
    assert squad.crew.running
    late = squad.join(bench.config(3, MODELS["vit"], dropout=0.1, graph="on"))
    squad.crew.epoch()
    squad.crew.rewind([first])
    resumed = squad.join(first.config)
    resumed.load_state_dict(first.state_dict())
    first.close()
    squad.crew.tidy()
    assert late in squad.crew.members
    squad.to_the_end()


def test_a_step_is_captured_on_the_stream_of_its_lane(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[torch.cuda.Stream] = []
    original = CapturedStep._capture

    def capture(step: CapturedStep, *arguments: object) -> None:
        streams.append(torch.cuda.current_stream())
        original(step, *arguments)  # type: ignore[arg-type] # passed on as they are

    monkeypatch.setattr(CapturedStep, "_capture", capture)
    for index in range(3):
        squad.join(bench.config(index, MODELS["mlp"], dropout=0.1, graph="on"))
    assert len({stream.cuda_stream for stream in streams}) == 3
    assert torch.cuda.default_stream() not in streams
    squad.to_the_end()


@pytest.mark.parametrize("model", MODELS)
def test_the_host_never_waits_within_an_epoch(model: str, bench: Bench) -> None:
    """One turn, which queues several batches."""
    config = bench.config(1, MODELS[model], dropout=0.1, precision="bfloat16", graph="on")
    dataset, device = bench.dataset(config), best_device()
    lane = Lane[None](device)
    with lane.entered():
        trial = NetworkTraining(
            config, dataset=dataset, device=device, objective=("val_accuracy", True)
        )
    engine, _ = trial._open()
    engine.train(epoch=1, lr=2.0**-7, before_batch=lambda: None)
    engine._order.rewind()
    lane.begin(engine._all_batches())
    with repeatable(device), _waiting_forbidden():
        assert lane.ready
        assert not lane.turn()
    lane.stop()
    trial.close()
