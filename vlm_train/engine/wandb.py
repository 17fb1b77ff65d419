"""Weights & Biases as a mirror of metrics.jsonl: it is fed the rows that were written, under the run's own id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_train.errors import ConfigError


class WandbSink:
    """Callable that forwards a metrics row.

    Args:
        project, entity: where the run belongs.
        mode: `online` or `offline` (files under the run directory, `wandb sync` uploads them).
        run_id: our run id; a resumed run continues the same W&B run.
        directory: the run directory.
        config: the resolved config, shown beside the curves.

    Raises ConfigError if W&B cannot be reached or has no login.
    """

    def __init__(
        self, *, project: str, entity: str | None, mode: str, run_id: str, directory: Path, config: dict[str, Any]
    ) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                mode="online" if mode == "online" else "offline",
                id=run_id,
                name=run_id,
                resume="allow" if mode == "online" else None,
                dir=str(directory),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"Weights & Biases did not start: {error}",
                got=f"logger=wandb logger.mode={mode}",
                remedy="`wandb login`, or logger.mode=offline, or logger=none",
            ) from error

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Logs one row at its step."""
        self._run.log(dict(row), step=row["step"])

    def close(self) -> None:
        """Flushes; a run that stops early is not marked as crashed."""
        self._run.finish()
