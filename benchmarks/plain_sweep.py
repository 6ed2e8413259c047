"""The plain way to run a study: what a person writes with Optuna, a DataLoader and MLflow.

Run by `bench_sweep.py`, which starts as many of these processes as there are jobs. Each takes
trials from one Optuna study in SQLite, loads images through torchvision's transforms and a
DataLoader, trains eagerly, and logs every epoch to MLflow through Optuna's own callback. Model,
optimizer and hyper-parameters are those of the study file, so that both ways train the same.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import mlflow
import optuna
import torch
from optuna_integration import MLflowCallback
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from sweeper.config import DataConfig, DataShape, TrialConfig, shape_of
from sweeper.config.data import Crop, Flip
from sweeper.models import build
from sweeper.optim import make_optimizer
from sweeper.store.tickets import tickets
from sweeper.study.parse import load

DATASETS = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "cifar10": datasets.CIFAR10,
}
GREY = ((0.1307,), (0.3081,))
COLOUR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]


def loaders(
    config: TrialConfig, folder: Path, processes: int
) -> tuple[Loader, Loader, Loader, DataShape]:
    """Training, validation and test images as a tutorial loads them."""
    data = config.data
    grey = data.name != "cifar10"
    known = [transforms.ToTensor(), transforms.Normalize(*(GREY if grey else COLOUR))]
    changed, centred = augmentations(data)
    kind = DATASETS[data.name]
    train: Dataset[tuple[torch.Tensor, torch.Tensor]] = kind(
        str(folder), train=True, transform=transforms.Compose([*changed, *known])
    )
    as_tested = transforms.Compose([*centred, *known])
    whole = kind(str(folder), train=True, transform=as_tested)
    test = kind(str(folder), train=False, transform=as_tested)
    count = data.limit or len(whole)
    held_out = int(data.validation)
    order = torch.randperm(len(whole))[:count].tolist()
    chosen, rest = order[held_out:], order[:held_out]
    return (
        DataLoader(
            Subset(train, chosen),
            config.train.batch_size,
            shuffle=True,
            num_workers=processes,
        ),
        DataLoader(Subset(whole, rest), 1000, num_workers=processes),
        DataLoader(test, 1000, num_workers=processes),
        shape_of(data),
    )


def augmentations(data: DataConfig) -> tuple[list[nn.Module], list[nn.Module]]:
    """torchvision's transforms for training and for evaluation."""
    changed: list[nn.Module] = []
    centred: list[nn.Module] = []
    for each in data.augment:
        if isinstance(each, Crop):
            side = each.size or 32
            changed.append(transforms.RandomCrop(side, padding=each.padding or None))
            centred.append(transforms.CenterCrop(side))
        elif isinstance(each, Flip):
            changed.append(transforms.RandomHorizontalFlip())
        else:
            raise SystemExit(f"the plain way has no augmentation {each.name}")
    return changed, centred


def evaluate(model: nn.Module, loader: Loader, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss, right, seen = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
    return loss / seen, right / seen


def train(config: TrialConfig, folder: Path, processes: int) -> float:
    """One trial: its best validation accuracy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, validation, test, shape = loaders(config, folder, processes)
    model = build(config.model, shape, seed=config.train.seed).to(device)
    optimizer = make_optimizer(config.optimizer, model.parameters(), capturable=False)
    best = 0.0
    for epoch in range(1, config.train.epochs + 1):
        model.train()
        total, right, seen = 0.0, 0, 0
        for images, labels in training:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        val_loss, val_accuracy = evaluate(model, validation, device)
        best = max(best, val_accuracy)
        mlflow.log_metrics(
            {
                "train_loss": total / seen,
                "train_accuracy": right / seen,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            },
            step=epoch,
        )
    test_loss, test_accuracy = evaluate(model, test, device)
    mlflow.log_metrics({"test_loss": test_loss, "test_accuracy": test_accuracy})
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--tracker", required=True)
    parser.add_argument("--trials", type=int, required=True, help="that this process takes")
    parser.add_argument("--loaders", type=int, default=0, help="DataLoader processes")
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec = load(options.study, options.overrides)
    planned = tickets(spec, with_reference=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        callback = MLflowCallback(tracking_uri=options.tracker, metric_name="val_accuracy")
        track = callback.track_in_mlflow()

    def objective(trial: optuna.Trial) -> float:
        index = trial.suggest_int("index", 0, len(planned) - 1)
        values = planned[index].values or {}
        mlflow.log_params(dict(values))
        return train(spec.trial_config(values), options.data, options.loaders)

    study = optuna.load_study(study_name=spec.name, storage=options.store)
    study.optimize(track(objective), n_trials=options.trials, callbacks=[callback])


if __name__ == "__main__":
    main()
