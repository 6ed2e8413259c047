"""sweeper: hyper-parameter sweeps with Optuna, torch and MLflow on one SQL server."""

__version__ = "0.1.0"
