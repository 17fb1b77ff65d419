"""Greedy tokens are those of transformers' LLaVA: in a batch and alone, with a cache and without, whole and sharded.

And an evaluation of unequally many samples a rank ends, with the results of one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from embedding_toys import batches
from test_answering import CPU, NEW, Words, make_answerer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.evaluation import answering
from vlm_train.evaluation.captioning import Captions
from vlm_train.evaluation.fixed_prompts import FixedPrompts
from vlm_train.evaluation.vqa import VisualQuestions, YesNo
from vlm_train.types import IMAGE_ID, Batch, rank_share

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from generative_toys import IMAGE_TOKEN, SIZE, SPEC, hugging_face_llava, make_batch, make_model, renamed, rows_of

LAYOUT = ((1, 9), (0, 7), (2, 12), (0, 2), (1, 3))  # (images, words) of each prompt


def weights() -> dict[str, Tensor]:
    ours = make_model(feature_layer=-2)
    return {**ours.state_dict(), **renamed(hugging_face_llava(-2).state_dict(), ours)}


def our_model() -> Any:
    model = make_model(feature_layer=-2).eval()
    model.load_state_dict(weights())
    return model


def ours(model: Any, batch: Batch) -> Tensor:
    fields: list[Any] = [batch[name] for name in ("images", "num_images", "dialogue_ids", "dialogue_lengths")]  # type: ignore[literal-required]
    return model.generate(*fields, max_new_tokens=NEW, eos_id=SPEC.eos_id)


def theirs(model: Any, batch: Batch, *, cached: bool, shift: int = 0) -> Tensor:
    """What transformers' LLaVA says, padding in front. `shift` puts each image in the place of the next one."""
    ids, lengths, numbers = batch["dialogue_ids"], batch["dialogue_lengths"].tolist(), batch["num_images"].tolist()
    longest = max(lengths)
    padded, mask = torch.zeros(len(ids), longest, dtype=torch.int64), torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, longest - length :] = torch.where(ids == IMAGE_ID, IMAGE_TOKEN, ids)[row, :length]
        mask[row, longest - length :] = 1
    there = [batch["images"][row, :number] for row, number in enumerate(numbers) if number]
    fields: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
    if there:
        fields["pixel_values"] = our_model().normalize(torch.cat(there).roll(shift, dims=0))
    found = model.generate(
        **fields, max_new_tokens=NEW, do_sample=False, use_cache=cached, eos_token_id=SPEC.eos_id,
        pad_token_id=SPEC.eos_id,
    )[:, longest:]  # fmt: skip
    return torch.nn.functional.pad(found, (0, NEW - found.shape[1]), value=SPEC.eos_id)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_greedy_tokens_are_those_of_transformers(cached: bool, alone: bool) -> None:
    batch = make_batch(LAYOUT)
    parts = [rows_of(batch, row) for row in range(len(LAYOUT))] if alone else [batch]
    llava = hugging_face_llava(-2)
    expected = torch.cat([theirs(llava, part, cached=cached) for part in parts])
    assert torch.equal(torch.cat([ours(our_model(), part) for part in parts]), expected)
    assert torch.equal(ours(our_model(), batch), expected) and len({tuple(row) for row in expected.tolist()}) == 5
    assert not torch.equal(
        theirs(llava, batch, cached=cached, shift=1), expected
    )  # the twin: each sees another's image


def of_sharded_ranks() -> list[list[list[int]]]:
    """Three prompts on the first rank, two on the second; and what a rank that has not the weights of rank 0 says."""
    model = our_model()
    start, stop = rank_share(len(LAYOUT), collectives.rank(), collectives.world_size())
    mine = rows_of(make_batch(LAYOUT), *range(start, stop))
    other = make_model(feature_layer=-2).eval()
    with torch.no_grad():
        other.text.vocabulary.copy_(other.text.vocabulary.roll(1, dims=0))
    found = []
    for each in (model, other):
        sharding.shard(each, init_device_mesh("cpu", (collectives.world_size(),)))
        found.append(ours(each, mine).tolist())
        with sharding.whole(each):
            found.append(ours(each, mine).tolist())
    return found


@pytest.mark.slow
def test_sharded_models_say_the_same() -> None:
    expected = theirs(hugging_face_llava(-2), make_batch(LAYOUT), cached=True).tolist()
    sharded, gathered, twin, _ = (
        first + second for first, second in zip(*run_ranks(of_sharded_ranks, 2, timeout=240), strict=True)
    )
    assert sharded == gathered == expected != twin


# ---- unequally many samples a rank


class Dialogues(Words):
    def opening(self, metadata: Mapping[str, Any], caption: str) -> tuple[str, str]:
        return "<image>", caption


def samples(num: int) -> Iterator[Batch]:
    """Unequally many questions and images a sample, some of them too long; noise for pictures."""
    metadata = [
        {"qa": [{"question": "ab" * (40 if n == 1 else 1 + k), "answer": "yes"} for k in range(n % 3 + 1)]}
        for n in range(num)
    ]
    for batch in batches([[f"a {n} b"] for n in range(num)], 2, metadata=metadata):
        seeds = batch["images"][:, 0, 0, 0].tolist()
        noise = [torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(n)) for n in seeds]
        there = [int(weight > 0) * (n % 3) for n, weight in zip(seeds, batch["weights"].tolist(), strict=True)]
        batch["images"], batch["num_images"] = torch.stack(noise).to(torch.uint8), torch.tensor(there)
        batch["errors"] = []
        yield batch


class Loader:
    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[Batch]:
        return samples(self.num)


def evaluated(model: Any, num: int) -> list[Any]:
    """The results, as text, and how often this rank asked the model."""
    nothing: Any = None
    suite = EvaluationSuite(
        evaluators={"vqa": VisualQuestions(), "yes_no": YesNo(), "prompts": FixedPrompts(num=3)}
        | ({"captions": Captions(prompt="a")} if num > 3 else {}),
        loader=Loader(num), train=nothing, tokenizer=nothing,
        interface=lambda model, device: make_answerer(model, dialogues=Dialogues()),
    )  # fmt: skip
    with (
        mock.patch.object(answering, "_QUESTIONS_PER_FORWARD", 3),
        mock.patch.object(model, "generate", wraps=model.generate) as generate,
    ):
        return [json.dumps(suite.run(model, CPU)), generate.call_count]


def of_unequal_ranks() -> list[Any]:
    """Ranks of three and two samples, of one and none; and what happens where ranks do not agree first."""
    model, plain = make_model().eval(), make_model().eval()
    sharding.shard(model, init_device_mesh("cpu", (collectives.world_size(),)))
    found = [*evaluated(model, 5), *evaluated(model, 1)]
    with mock.patch.object(collectives, "all_reduce_max", lambda number: number):
        return [*found, evaluated(plain, 5)[1]]


@pytest.mark.slow
def test_ranks_with_unequally_many_samples_end_with_the_result_of_one_process() -> None:
    """A rank that waits for another for good is ended, and the test with it, by the time that it may take."""
    alone = [evaluated(make_model().eval(), num)[0] for num in (5, 1)]
    ranks = run_ranks(of_unequal_ranks, 2, timeout=300)
    assert [[rank[0], rank[2]] for rank in ranks] == [alone, alone]
    assert ranks[0][1] == ranks[1][1] > 4 and ranks[0][3] == ranks[1][3] > 2
    assert ranks[0][4] != ranks[1][4]  # the twin: unequally often, which a sharded model would wait for
    assert json.loads(alone[0])["vqa"]["num_unanswerable"] > 0
