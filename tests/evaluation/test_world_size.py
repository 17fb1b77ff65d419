"""Evaluation on several ranks: the scores of one process, to the last bit, and equally many forwards on every rank."""

from __future__ import annotations

import json

import pytest
import torch
from embedding_toys import CAPTIONS, LABELS, NAMES, ToyEmbedder, ToyTrain, batches
from ranking_cases import broken, on_ranks, words
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.evaluation.base import Embedder
from vlm_train.evaluation.composition import Composition
from vlm_train.evaluation.fine_grained import FineGrained
from vlm_train.evaluation.probe import Probe
from vlm_train.evaluation.retrieval import Retrieval
from vlm_train.evaluation.zero_shot import ZeroShot
from vlm_train.types import TextSpec

TRAIN_LABELS = [0, 1, 2, 3, 4, 5, 6, 3, 1, 4, -1, 0, 6, 2, 5]
# some samples have no pair; the kinds of one rank are not those of another; one pair is a tie
PAIRS: list[dict] = [
    {"contrasts": [{"true": f"item {n}", "false": f"other {n} 1", "type": "order" if n < 3 else "count"}]}
    for n in range(5)
]
PAIRS += [{}, {"negatives": ["item 4", "item 0"]}]


def scores() -> str:
    """Everything that the evaluators say, as text, so that equality means equality of every bit."""
    retrieval = Retrieval()
    recall = retrieval.run(ToyEmbedder(), batches(CAPTIONS, 4))
    shown = retrieval.examples
    assert shown is not None
    examples = [shown.keys, shown.captions, shown.searches, shown.similarity.tolist()]
    labelled = [[]] * len(LABELS)
    accuracy = ZeroShot(classes=NAMES, templates="plain").run(ToyEmbedder(), batches(labelled, 3, LABELS))
    # more ranks than classes: some embed none
    pair = ZeroShot(classes=NAMES[:2]).run(ToyEmbedder(), batches([[]] * 4, 3, [0, 1, 1, -1]))
    fine = FineGrained(classes=NAMES, templates="plain").run(ToyEmbedder(), batches(labelled, 3, LABELS))
    probe = Probe(ks=(1, 3), shots=(1, 2), draws=2)
    probe.fit(ToyEmbedder(), ToyTrain(TRAIN_LABELS))
    probed = probe.run(ToyEmbedder(), batches(labelled, 3, LABELS))
    composition = Composition()
    composition.fit(ToyEmbedder(), ToyTrain([], ["item 1", "item 2", "other thing"]))
    composed = composition.run(ToyEmbedder(), batches([["item 0"]] * len(PAIRS), 2, metadata=PAIRS))
    return json.dumps([recall, examples, accuracy, pair, fine, probed, composed])


class CountedModel(nn.Module):
    """Counts its forwards."""

    num_forwards = 0

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.num_forwards += 1
        return ids.float()


class OneToken:
    spec = TextSpec(vocab_size=2, context_length=1, pad_id=0, bos_id=None, eos_id=1)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.ones(len(texts), 1, dtype=torch.int64), torch.ones(len(texts), 1, dtype=torch.bool)


def everything() -> list:
    model = CountedModel()
    embedder = Embedder(model=model, tokenizer=OneToken(), device=torch.device("cpu"))
    features = embedder.texts(["word"] * [300, 0, 10][collectives.rank()])
    return [scores(), len(features), model.num_forwards, on_ranks(), words(), broken()]


@pytest.fixture(scope="module")
def alone() -> str:
    return scores()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_gives_the_scores_of_one_process(alone: str, world_size: int) -> None:
    results = run_ranks(everything, world_size)
    assert [result[0] for result in results] == [alone] * world_size
    # ranks with 300, 0 and 10 texts all run the two forwards of the longest
    assert [result[1:3] for result in results] == [[300, 2], [0, 2], [10, 2]][:world_size]
    for shares, _, error in (result[3:] for result in results):
        assert all(all(found[:3]) for found in shares) and not all(found[3] for found in shares)
        assert f"1 of {2 * world_size + world_size * (world_size - 1) // 2} rows, first is row 3" in error
    if world_size == 3:  # each caption has the features of the first on any rank, whatever noise its own had
        (a, b, same), nobody, last = (result[4] for result in results)
        assert a == same == last[2] and b == last[0] and last[1] == last[3] and nobody == []
        assert a[0] != b[0] and last[1][0] not in (a[0], b[0])


def test_the_mean_of_the_shares_own_scores_is_not_the_score() -> None:
    whole = Retrieval().run(ToyEmbedder(), batches(CAPTIONS, 11))["text_to_image"]["R@1"]
    shares = [Retrieval().run(ToyEmbedder(), iter([share])) for share in batches(CAPTIONS, 11)]
    assert sum(share["text_to_image"]["R@1"] for share in shares) / 2 > whole + 1
