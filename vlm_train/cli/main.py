"""`vlm-train <verb> [group=choice] [key=value]`: the table of verbs, and what an exception means for the exit code.

Nothing heavy is imported before a verb is chosen: a bare `vlm-train` and `--help` answer in a fraction of a second.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from vlm_train import __version__
from vlm_train.cli.outcome import leave, tell
from vlm_train.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: the module whose `main(arguments)` runs it, what it does, and an example to copy."""

    module: str
    summary: str
    example: str


VERBS = {
    "train": Verb("vlm_train.cli.train", "train a model; resumes by itself", "vlm-train train experiment=quickstart"),
    "plan": Verb(
        "vlm_train.cli.plan",
        "memory, time and money of a run before it starts",
        "vlm-train plan experiment=clip_b16 gpu=h100 gpus=8,64",
    ),
    "submit": Verb(
        "vlm_train.cli.submit",
        "train as a job of SLURM, which goes on by itself",
        "vlm-train submit experiment=quickstart launch.partition=gpu",
    ),
    "watch": Verb("vlm_train.cli.watch", "look at a run while it trains", "vlm-train watch runs/quickstart/latest"),
    "evaluate": Verb(
        "vlm_train.cli.evaluate", "measure a trained run", "vlm-train evaluate run=runs/quickstart/latest"
    ),
    "checkpoints": Verb(
        "vlm_train.cli.checkpoints",
        "list, verify and prune what a run has saved",
        "vlm-train checkpoints verify runs/quickstart/latest",
    ),
    "predict": Verb(
        "vlm_train.cli.predict",
        "search images by text",
        'vlm-train predict run=RUN text="a red car" images=DIR out=grid.png',
    ),
    "export": Verb(
        "vlm_train.cli.export", "write a model for transformers or open_clip", "vlm-train export run=RUN out=exported"
    ),
    "import": Verb(
        "vlm_train.cli.import_weights",
        "read a model of transformers or open_clip",
        "vlm-train import from=FOLDER out=runs/imported/clip",
    ),
    "data": Verb(
        "vlm_train.cli.data", "import, make or index a dataset", "vlm-train data import openmoji data/openmoji"
    ),
    "doctor": Verb(
        "vlm_train.cli.doctor", "check this machine, and what a run needs", "vlm-train doctor experiment=quickstart"
    ),
    "sync": Verb("vlm_train.cli.sync", "send a run to Weights & Biases", "vlm-train sync runs/quickstart/latest"),
    "configs": Verb("vlm_train.cli.configs", "list, show and search configs", "vlm-train configs search lr"),
}


def usage() -> str:
    """The table of verbs with an example each."""
    lines = [f"vlm-train {__version__}: a config says what is learned; the machine says only how fast.", ""]
    lines += ["usage: vlm-train <verb> [group=choice] [key=value]", ""]
    for name, verb in VERBS.items():
        lines += [f"  {name:11} {verb.summary}", f"  {'':11}   {verb.example}"]
    return "\n".join([*lines, "", "vlm-train <verb> --help tells more."])


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb. Exit codes: 0 done, 2 the user's mistake, 1 a failure, 130 Ctrl-C after saving."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    try:
        return _main(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return tell(error, words)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    return importlib.import_module(_verb(words[0]).module).main(words[1:])


def _verb(name: str) -> Verb:
    if name not in VERBS:
        close = nearest(name, VERBS)
        raise ConfigError(
            "no such verb", got=name, allowed=", ".join(VERBS), remedy=f"vlm-train {close[0]}" if close else "vlm-train"
        )
    return VERBS[name]


def run() -> NoReturn:
    """The command `vlm-train`."""
    leave(main())


if __name__ == "__main__":
    run()
