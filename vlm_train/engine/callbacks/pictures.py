"""Draws what a person looks at while a run goes on, and writes the report when it ends early.

Pictures never stop a run: one that cannot be drawn is a warning, because the numbers are in the records anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning

from vlm_train.distributed import collectives
from vlm_train.engine import pictures
from vlm_train.engine.environment import environment
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.engine.report import write_report
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.stops import Interrupted
from vlm_train.errors import VlmError
from vlm_train.evaluation.retrieval import Retrieval, RetrievalExamples
from vlm_train.log import get_logger
from vlm_train.types import Batch, ImageSpec

LOG = get_logger(__name__)

Gallery = Callable[[Sequence[str]], pictures.Pixels]
"""Keys of validation samples -> their pictures."""


class Pictures(lightning.Callback):
    """media/first_batch.png before the first step, the pictures of each evaluation after it. Stands after `Evaluate`.

    Args:
        run: the run's directory.
        suite: whose examples are drawn.
        image: how the vision tower normalises pixels.
        gallery: where the pictures of the validation split come from.
    """

    def __init__(self, *, run: RunDirectory, suite: EvaluationSuite, image: ImageSpec, gallery: Gallery) -> None:
        self.run, self.suite, self.image, self.gallery = run, suite, image, gallery
        self._is_first = True
        self._drawn: RetrievalExamples | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Records what trains on what: machines may change from one resume to the next."""
        if trainer.is_global_zero:
            self.run.event("environment", environment(pl_module.model, pl_module.device, trainer.world_size))

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Draws the first batch of the run; a resumed run that has the picture keeps it."""
        is_first, self._is_first = self._is_first, False
        path = self.run.media / "first_batch.png"
        if is_first and trainer.is_global_zero and not path.exists():
            ranks = trainer.world_size
            _attempt(lambda: pictures.first_batch(batch, self.suite.tokenizer, self.image, num_ranks=ranks).save(path))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draws the examples of an evaluation that this step ran."""
        examples = retrieval_examples(self.suite)
        if examples is None or examples is self._drawn:
            return
        self._drawn = examples
        if collectives.rank() == 0:
            draw_examples(self.run, examples, self.gallery, step=batch["step"] + 1)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """A run that was asked to stop leaves its report."""
        if isinstance(exception, Interrupted) and trainer.is_global_zero:
            _attempt(lambda: write_report(self.run))


def retrieval_examples(suite: EvaluationSuite) -> RetrievalExamples | None:
    """What the suite's first retrieval evaluator has kept to be shown, if it has run."""
    kept = (evaluator.examples for evaluator in suite.evaluators.values() if isinstance(evaluator, Retrieval))
    return next((examples for examples in kept if examples is not None), None)


def draw_examples(run: RunDirectory, examples: RetrievalExamples, gallery: Gallery, *, step: int) -> None:
    """media/similarity.png and media/retrieval_grid.png of one evaluation."""

    def draw() -> None:
        pixels = gallery([*examples.keys, *(key for _, hits in examples.searches for key, _ in hits)])
        first = f"the first {len(examples.keys)} validation pairs after step {step}; the right ones are outlined"
        pictures.similarity(examples, pixels, subtitle=first).save(run.media / "similarity.png")
        best = f"validation captions after step {step}; the images that score highest, with their cosine"
        pictures.retrieval_grid(examples, pixels, subtitle=best).save(run.media / "retrieval_grid.png")

    _attempt(draw)


def _attempt(draw: Callable[[], None]) -> None:
    try:
        draw()
    except (OSError, VlmError) as error:
        LOG.warning("a picture was not drawn: %s", error)
