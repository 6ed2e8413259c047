"""What the best model says of the test set, and where that is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report.conftest import row

from sweeper.config import TrialConfig
from sweeper.data import load
from sweeper.models import build
from sweeper.report import model
from sweeper.report.model import BestModel, Weights, predict


@pytest.fixture
def best(tmp_path: Path) -> BestModel:
    config = TrialConfig.model_validate({"data": {"name": "digits"}, "model": {"name": "mlp"}})
    dataset = load(config.data, folder=tmp_path, device=torch.device("cpu"))
    network = build(config.model, dataset.shape, seed=0).eval()
    weights = Weights(trial=row(0), run_id="", config=config, tensors=network.state_dict())
    return BestModel(weights=weights, dataset=dataset, network=network)


def test_a_gpu_is_set_up_only_where_a_cpu_takes_longer_than_that(
    best: BestModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def gpu() -> torch.device:
        asked.append(True)
        return torch.device("cpu")

    monkeypatch.setattr(model, "best_device", gpu)
    without = predict(best, limit_s=60)
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "_GPU_SETUP_S", 60.0)
    there = predict(best, limit_s=60)
    assert not asked
    monkeypatch.setattr(model, "_GPU_SETUP_S", 0.0)
    needed = predict(best, limit_s=60)
    assert asked
    for said in (there, needed):
        assert said.total == len(said.index_n) == len(best.dataset.test)
        assert (said.predicted_n == without.predicted_n).all()


def test_every_image_is_predicted_once_or_as_many_as_there_is_time_for(best: BestModel) -> None:
    said = predict(best, limit_s=60)
    assert sorted(said.index_n) == list(range(len(best.dataset.test)))
    with torch.inference_mode():
        scores = best.network(best.dataset.standardize(best.dataset.test.images))
    order = torch.from_numpy(said.index_n)
    assert (said.predicted_n == scores.argmax(1)[order].numpy()).all()
    assert said.confidence_n == pytest.approx(scores.softmax(1).amax(1)[order].numpy(), abs=1e-5)
    assert (said.label_n == best.dataset.test.labels[order].numpy()).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "evaluation_batch", lambda *_: 7)
        short = predict(best, limit_s=0)
    assert len(short.index_n) == 7
    assert short.total == said.total
