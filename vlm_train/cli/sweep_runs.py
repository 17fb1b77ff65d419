"""`vlm-train train --sweep`: the runs of a sweep on this machine, one after another, each in processes of its own.

A run that fails does not end the others; a signal ends all, as it ends a run. The same command goes on: runs that are
over stay as they are, the one that was interrupted resumes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlm_train.cli.outcome import tell
from vlm_train.cli.sweep_words import SweepWords
from vlm_train.engine.stops import SIGNALS
from vlm_train.locations import scrubbed

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.planned import PlannedRun
    from vlm_train.cli.sweep_folder import SweepFolder
    from vlm_train.cli.sweep_search import Chooser
    from vlm_train.cli.sweep_values import Swept
    from vlm_train.engine.rundir import RunDirectory


class Train(Protocol):
    """`train.train_chosen`: trains a run that this process holds."""

    def __call__(self, chosen: PlannedRun, run: RunDirectory, checkpoint: Path | None, *, apart: bool) -> int:
        """Returns the exit code."""


def train_all(words: list[str], asked: SweepWords, train: Train) -> int:
    """Trains every run that is not over. Returns 0, 1 where one failed, 128 + signal where that ended them.

    Raises:
        ConfigError: something that can be known before a run, or a goal that the first run that finished does not
            measure.
    """
    from vlm_train.cli.runs import locked
    from vlm_train.cli.sweep_folder import choose_sweep

    chooser = _chooser(words, asked)
    config = _checked(words, asked, chooser)
    folder = choose_sweep(config, asked.sweeps, is_search=asked.num_trials is not None)
    with locked(folder):
        folder.read()
        folder.begin(config)
        print(f"sweep: {chooser.num_runs} runs in {folder.path}", flush=True)
        signalled = _LocalSweep(words, asked, chooser, folder, train).train_rest(config.seed)
        return _told(folder, asked, signalled)


def _chooser(words: list[str], asked: SweepWords) -> Chooser:
    """What the runs are given. Raises ConfigError."""
    from vlm_train.cli.sweep_search import Grid, Search
    from vlm_train.cli.sweep_values import read_grid, read_sweeps

    if asked.num_trials is None:
        return Grid(read_grid(asked.sweeps, words))
    assert asked.goal is not None, "split_sweep refuses a search without one"
    return Search(read_sweeps(asked.sweeps, words), asked.num_trials, asked.goal)


def _checked(words: list[str], asked: SweepWords, chooser: Chooser) -> DictConfig:
    """The config of the first run; what can be refused of any of them has been. Raises ConfigError."""
    from vlm_train.cli.planned import refuse_nodes
    from vlm_train.cli.sweep_table import check_goal
    from vlm_train.cli.sweeps import planned_of

    runs = [planned_of(words, swept) for swept in chooser.samples]
    for run in runs:
        refuse_nodes(run.config)
    first = runs[0]
    if asked.goal is not None:
        last = [first.config, *first.stages.values()][-1]
        check_goal(asked.goal, list(last.evaluation.evaluators))
    return first.config


@dataclass(frozen=True, slots=True)
class _LocalSweep:
    """A sweep whose folder this process holds."""

    words: list[str]
    asked: SweepWords
    chooser: Chooser
    folder: SweepFolder
    train: Train

    def train_rest(self, seed: int) -> int:
        """Trains what is not over. Returns the exit code of a run that a signal ended, 0 where none did."""
        from vlm_train.cli.sweep_folder import Row
        from vlm_train.cli.sweep_table import check_measured, measured
        from vlm_train.cli.sweep_values import in_words
        from vlm_train.cli.sweeps import name_of
        from vlm_train.engine.rundir import RunDirectory

        rows, num_runs = self.folder.rows, self.chooser.num_runs
        for number in range(num_runs):
            check_measured(self.asked.goal, rows)
            if number == len(rows):
                swept = self.chooser.choose(number, rows, seed)
                rows.append(Row(run=name_of(number, swept), swept=swept))
            row = rows[number]
            if row.state in self.chooser.over:
                continue
            row.state, self.folder.is_finished = "running", False
            self.folder.write()
            print(f"\nrun {number + 1} of {num_runs}: {scrubbed(' '.join(in_words(row.swept)))}", flush=True)
            self._refuse_changed_files()
            code = self._train_one(number, row.swept)
            is_signalled = code - 128 in SIGNALS
            row.state = "interrupted" if is_signalled else "failed" if code else "finished"
            row.step, row.metrics = measured(RunDirectory(self.folder.path / row.run))
            self.folder.write()
            if is_signalled:
                return code
        check_measured(self.asked.goal, rows)
        self.folder.is_finished = all(row.state in self.chooser.over for row in rows)
        self.folder.write()
        return 0

    def _train_one(self, number: int, swept: Swept) -> int:
        """One run, from where it was left. Returns its exit code."""
        from vlm_train.cli.runs import choose_run, locked
        from vlm_train.cli.sweep_values import in_words
        from vlm_train.cli.sweeps import place, planned_of

        try:
            run = planned_of(self.words, swept)
            place(run, self.folder.path, number, swept)
            directory, _ = choose_run(run.config)  # refuses one that was trained with another config
            with locked(directory):
                return 0 if directory.is_finished() else self.train(run, directory, None, apart=True)
        except Exception as error:  # the others may do
            return tell(error, [*self.words, *in_words(swept)])

    def _refuse_changed_files(self) -> None:
        """Config files may be edited while a sweep trains; its runs would then differ in more than it says. Raises
        ConfigError."""
        from vlm_train.cli.runs import refuse_other_config
        from vlm_train.cli.sweeps import planned_of

        refuse_other_config(planned_of(self.words, self.chooser.samples[0]).config, self.folder)


def _told(folder: SweepFolder, asked: SweepWords, signalled: int) -> int:
    """Prints what became of the runs. Returns the exit code of the command."""
    from vlm_train.cli.sweep_table import best, lines

    width = shutil.get_terminal_size((120, 40)).columns
    print("\n".join(["", *lines(folder.rows, asked.goal, width), "", f"all numbers: {folder.table}"]))
    if (winner := best(folder.rows, asked.goal)) is not None:
        print(f"best: {folder.path / winner.run}")
    failed = [row for row in folder.rows if row.state == "failed"]
    for row in failed:
        print(f"failed: {folder.path / row.run}")
    if signalled:
        print("next: the same command goes on")
    return signalled or (1 if failed else 0)
