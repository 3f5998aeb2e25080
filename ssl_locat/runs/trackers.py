"""Where a run's numbers go besides metrics.jsonl: TensorBoard, wandb, mlflow. Each library is imported by the tracker that needs it.

None of them sends anything anywhere unless its own environment variables say so.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ssl_locat.errors import UserError


class Tracker(Protocol):
    """Takes what `MetricsLog` writes, on rank 0: made from (run folder, step resumed from or 0, config as plain values without credentials)."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One step's plain numbers."""

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides what a former attempt wrote beyond the checkpoint
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Offline unless WANDB_MODE=online; `wandb sync RUN/wandb/offline-run-*` uploads later."""

    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import; it reports to its makers otherwise
        try:
            import wandb
        except ImportError:
            raise UserError("The wandb tracker needs the wandb package: pip install 'ssl_locat[wandb]'.") from None
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", "ssl_locat")
        self.run = wandb.init(dir=str(run_dir), name=run_dir.name, project=project, mode=mode, config=config)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """Into RUN/mlruns unless MLFLOW_TRACKING_URI names a server; look with `mlflow ui --backend-store-uri RUN/mlruns`."""

    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # plain files: its newer default needs a database driver
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise UserError("The mlflow tracker needs the mlflow package: pip install 'ssl_locat[mlflow]'.") from None
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", (run_dir / "mlruns").resolve().as_uri()))
        experiment = self.client.get_experiment_by_name("ssl_locat")
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment("ssl_locat")
        self.run_id = self.client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        for name, value in config.items():
            self.client.log_param(self.run_id, name, str(value)[:500])  # the shortest limit of its stores

    def log(self, step: int, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        # mlflow counts in milliseconds
        now = int(time.time() * 1000)
        numbers = [Metric(name, float(value), now, step) for name, value in values.items() if isinstance(value, int | float)]
        self.client.log_batch(self.run_id, metrics=numbers)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
