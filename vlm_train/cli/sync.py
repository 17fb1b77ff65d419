"""`vlm-train sync`: the folder of a run, as it is, into Weights & Biases as one run."""

from __future__ import annotations

import shlex
from typing import Any

from vlm_train.cli.options import Option, arguments, choice, plain
from vlm_train.cli.progress import Ticker
from vlm_train.errors import ConfigError

USAGE = """usage: vlm-train sync RUN ... [--mode online|offline] [--project NAME] [--entity NAME]

  vlm-train sync runs/quickstart/latest                   what W&B does not have of it yet, under the run's id
  vlm-train sync runs/quickstart/latest --mode offline    one folder RUN/wandb/offline-run-*, for `wandb sync` later

Rows, scores of evaluations and pictures. Can be repeated, also while the run trains; project and entity are those of
the run's config where nothing else is said."""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    runs, options = parsed(words)
    from pathlib import Path

    from vlm_train.schema import read_config

    configs = [(Path(run), read_config(Path(run))) for run in runs]  # refused before any of them is sent
    for path, config in configs:
        sync(path, config, options)
    return 0


def parsed(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(runs, options). Raises ConfigError."""
    known = {
        "--mode": Option(choice("online", "offline"), "online"),
        "--project": Option(plain),
        "--entity": Option(plain),
    }
    return arguments(words, {"RUN": plain}, known, many=True)


def sync(path: Any, config: Any, options: dict[str, Any]) -> None:
    """One run. Raises ConfigError where W&B cannot be reached, or the run has no row yet."""
    from vlm_train.engine.rundir import RunDirectory
    from vlm_train.engine.wandb import begin, replay
    from vlm_train.locations import in_texts, scrubbed
    from vlm_train.schema import plain as as_dict

    run = RunDirectory(path.resolve())
    if not run.last_step():
        stages = sorted(f"{path}/{stage.name}" for stage in run.path.glob("stage-*"))
        raise ConfigError(f"{path} has nothing to send", got="no row in metrics.jsonl",
                          allowed="a run that has trained, or a stage of one",
                          remedy=f"vlm-train {f'sync {shlex.join(stages)}' if stages else 'train ...'}")  # fmt: skip
    resolved = in_texts(scrubbed, as_dict(config))
    said = {key: _said(resolved, key) for key in ("logger.project", "logger.entity", "run.id")}
    there = begin(
        run,
        project=options["--project"] or said["logger.project"] or "vlm-train",
        entity=options["--entity"] or said["logger.entity"],
        mode=options["--mode"],
        run_id=said["run.id"] or run.path.name,
        config=resolved,
        words={"project": "--project NAME", "offline": "--mode offline"},
    )
    url = there.url
    num = replay(run, there, Ticker("rows"))
    print(f"{path}: {num} rows sent{f' to {url}' if url else ''}")


def _said(config: dict[str, Any], key: str) -> str | None:
    """What a config says under GROUP.KEY, None where it says nothing there."""
    group, _, name = key.partition(".")
    part = config.get(group)
    value = part.get(name) if isinstance(part, dict) else None
    return None if value is None else str(value)
