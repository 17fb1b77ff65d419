"""Generative models: packed rows that leak nothing, and greedy answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generative_toys import (
    SPEC,
    as_theirs,
    gradients,
    hugging_face_llava,
    largest,
    logits,
    loss,
    make_batch,
    make_model,
    make_text,
    renamed,
    rows_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.errors import ConfigError
from vlm_train.models import generative, packing
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.packing import Texts
from vlm_train.models.vision.resnet import ResNet
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import NO_LABEL, Batch, Model

EXACT = 1e-12  # fp64
NEW = 6
SMALL: Any = {"width": 32, "num_layers": 1, "num_heads": 2}


def run(model: GenerativeModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of the sum over what is to be told."""
    model.zero_grad()
    hidden = model(batch)["token_hidden"]
    labels = batch["dialogue_labels"]
    scores = nn.functional.cross_entropy(
        logits(model, batch).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
    scores.backward()
    return hidden.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def leaking(name: str) -> type[Texts]:
    """The twins: borders forgotten, with positions through the row, or anew for each dialogue."""

    class Leaking(Texts):
        @classmethod
        def of(cls, lengths: Any, device: torch.device) -> Texts:
            right = Texts.of(lengths, device)
            positions = torch.arange(sum(lengths)) if name == "positions through the row" else right.positions_N
            return Leaking(lengths=lengths, starts_B1=right.starts_B1, positions_N=positions)

        def places(self, num_tokens: int) -> Tensor:
            return Texts.of(self.lengths, self.positions_N.device).places(num_tokens)

    return Leaking


def forget_borders(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on a dialogue reads those before it."""
    monkeypatch.setattr(generative, "Texts", leaking(name))
    right = packing.attend_texts

    def attend(q: Tensor, k: Tensor, v: Tensor, texts: Texts, **others: Any) -> Tensor:
        return right(q, k, v, Texts.of([sum(texts.lengths)], q.device), **others)

    monkeypatch.setattr(packing, "attend_texts", attend)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, EXACT)])
def test_dialogues_together_and_alone_give_the_same(
    dtype: torch.dtype, bar: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in fp32 1e-6 of hidden states and 2e-6 of gradients up to 4.5, in fp64 0 and 2e-15."""
    model, batch = make_model().to(dtype), make_batch()
    together, gradients_together = run(model, batch)
    total = {name: torch.zeros_like(value) for name, value in gradients_together.items()}
    for row, length in enumerate(batch["dialogue_lengths"].tolist()):
        alone, gradients_alone = run(model, rows_of(batch, row))
        assert (alone[0] - together[row, :length]).abs().max() < bar
        total = {name: value + gradients_alone[name] for name, value in total.items()}
    assert largest(total, gradients_together) < bar
    for name in ("positions through the row", "positions anew"):
        with monkeypatch.context() as patch:
            forget_borders(patch, name)
            leaked, gradients_leaked = run(model, batch)
        assert (leaked - together).abs().max() > 100 * bar
        assert largest(gradients_leaked, gradients_together) > 100 * bar


def test_a_dialogue_cannot_change_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model().eval(), make_batch()
    for row, (start, stop) in enumerate([(0, 1), (0, 7), (0, 1), (0, 1), (5, 7)]):
        other = Batch(**batch)
        other["dialogue_ids"] = batch["dialogue_ids"].clone()
        other["dialogue_ids"][row, start:stop] = (other["dialogue_ids"][row, start:stop] + 5) % 60
        before, after = model(batch)["token_hidden"], model(other)["token_hidden"]
        rest = [index for index in range(5) if index != row]
        assert torch.equal(before[rest], after[rest])
        assert (before[row] - after[row]).abs().max() > 1e-2
    forget_borders(monkeypatch, "positions anew")
    other["dialogue_ids"] = batch["dialogue_ids"].clone()
    other["dialogue_ids"][0, 0] += 1  # of the first in the row
    changes = (model(batch)["token_hidden"] - model(other)["token_hidden"])[[1, 2, 3, 4]]
    assert changes.abs().amax(dim=(1, 2)).min() > 1e-4


def test_under_bf16_the_hidden_states_are_near_those_of_fp32() -> None:
    """Measured 0.8 % of their size; a wrong cast in tower, connector or row would be an error."""
    model, batch = make_model().eval(), make_batch()
    expected = model(batch)["token_hidden"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)["token_hidden"]
        assert answers(model, batch).shape == (5, NEW)
        loss(model, batch).backward()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert len(gradients(model)) == len(list(model.parameters()))


def test_padding_gives_zeros_and_its_length_changes_nothing() -> None:
    model, batch = make_model().eval(), make_batch()
    longer = Batch(**batch)
    longer["dialogue_ids"] = nn.functional.pad(batch["dialogue_ids"], (0, 5), value=7)
    outputs = model(longer)
    assert outputs.keys() == model.outputs and outputs["token_vocabulary"].shape == (64, 48)
    assert not outputs["token_hidden"][:, 20:].any() and not outputs["token_hidden"][3, 1:].any()
    assert torch.equal(outputs["token_hidden"][:, :20], model(batch)["token_hidden"])


# ---- images


def test_each_dialogue_reads_its_own_images_in_their_order() -> None:
    model, batch = make_model().eval(), make_batch()
    before = model(batch)["token_hidden"]
    for row, place, readers in [(0, 0, [0]), (2, 0, [2]), (2, 1, [2]), (1, 0, []), (0, 1, []), (3, 1, [])]:
        other = Batch(**batch)
        other["images"] = batch["images"].clone()
        other["images"][row, place] = 255 - other["images"][row, place]
        changes = (model(other)["token_hidden"] - before).abs().amax(dim=2)
        assert [index for index in range(5) if changes[index].max() > 0] == readers
        if readers:
            first = 1 + 4 * place
            assert not changes[row, :first].any() and changes[row, first : first + 4].min() > 1e-3


def test_one_image_each_needs_no_axis_of_images_and_floats_are_taken_as_normalised() -> None:
    model, batch = make_model().eval(), make_batch(((1, 4), (1, 6)))
    expected = model(batch)["token_hidden"]
    flat = Batch(**batch)
    flat["images"] = batch["images"][:, 0]
    assert torch.equal(model(flat)["token_hidden"], expected)
    flat["images"] = model.normalize(flat["images"])
    assert torch.equal(model(flat)["token_hidden"], expected)


@pytest.mark.parametrize("has_images", [True, False])
def test_without_an_image_tower_and_connector_get_gradients_of_zero(has_images: bool) -> None:
    model, batch = make_model(), make_batch(((0, 4), (0, 9)))
    lengths = batch["dialogue_lengths"].tolist()
    ids = torch.cat([row[:length] for row, length in zip(batch["dialogue_ids"], lengths, strict=True)])
    expected = model.text(model.text.embed(ids), Texts.of(lengths, ids.device))
    if not has_images:
        del batch["images"]
    loss(model, batch).backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    for name, gradient in gradients(model).items():
        assert gradient.any() == name.startswith("text"), name
    assert torch.equal(model(batch)["token_hidden"][1, : lengths[1]], expected[lengths[0] :])


def test_a_frozen_language_model_still_teaches_the_connector() -> None:
    model, batch = make_model(), make_batch()
    loss(model, batch).backward()
    expected = {name: value for name, value in gradients(model).items() if not name.startswith("text")}
    model.zero_grad()
    model.text.requires_grad_(False)
    model.train()
    assert not any(part.training for part in model.text.modules()) and model.vision.training  # type: ignore[attr-defined]
    loss(model, batch).backward()
    assert largest(gradients(model), expected) == 0 and all(value.any() for value in expected.values())


def test_the_class_token_is_read_only_if_asked_for() -> None:
    without, with_it = make_model(), make_model(drop_class_token=False)
    assert without.tokens_per_image == 4 and with_it.tokens_per_image == 5
    tower: Any = copy.deepcopy(without.vision)
    tower.pool = "mean"
    assert make_model(vision=tower).first_patch == 0 and without.first_patch == 1


# ---- answers


def prompts() -> Batch:
    return make_batch(((1, 9), (0, 7), (2, 12), (0, 2), (1, 3)))


def answers(model: GenerativeModel, batch: Batch, **options: Any) -> Tensor:
    fields = [batch[name] for name in ("images", "num_images", "dialogue_ids", "dialogue_lengths")]  # type: ignore[literal-required]
    return model.generate(*fields, **{"max_new_tokens": NEW, "eos_id": SPEC.eos_id, **options})


def slowly(model: GenerativeModel, batch: Batch) -> Tensor:
    """Greedy answers without a cache: the whole dialogue is read anew for each token."""
    batch = Batch(**batch)
    rows = torch.arange(len(batch["dialogue_ids"]))
    for _ in range(NEW):
        found = logits(model, batch)[rows, batch["dialogue_lengths"] - 1].argmax(dim=1)
        ids = nn.functional.pad(batch["dialogue_ids"], (0, 1))
        ids[rows, batch["dialogue_lengths"]] = found
        batch["dialogue_ids"], batch["dialogue_lengths"] = ids, batch["dialogue_lengths"] + 1
    return torch.stack([row[length - NEW : length] for row, length in zip(ids, batch["dialogue_lengths"], strict=True)])


def test_greedy_answers_are_those_of_each_alone_without_a_cache_and_of_llava() -> None:
    theirs, ours, batch = hugging_face_llava(-2), make_model(feature_layer=-2).eval(), prompts()
    ours.load_state_dict(renamed(theirs.state_dict(), ours))
    found = answers(ours, batch)
    assert found.shape == (5, NEW) and len({tuple(row) for row in found.tolist()}) == 5
    for row in range(5):
        assert torch.equal(answers(ours, rows_of(batch, row))[0], found[row])
    assert torch.equal(slowly(ours, batch), found)
    fields = as_theirs(ours, batch)
    longest, fields["input_ids"] = int(batch["dialogue_lengths"].max()), fields["input_ids"].clone()
    for row, length in enumerate(batch["dialogue_lengths"].tolist()):
        fields["input_ids"][row] = fields["input_ids"][row].roll(longest - length)
        fields["attention_mask"][row] = fields["attention_mask"][row].roll(longest - length)
    del fields["labels"]
    assert torch.equal(theirs.generate(**fields, max_new_tokens=NEW, do_sample=False, pad_token_id=2)[:, -NEW:], found)

    fields["attention_mask"] = torch.ones_like(fields["attention_mask"])  # the twin: padding in front is read
    twin = theirs.generate(**fields, max_new_tokens=NEW, do_sample=False, pad_token_id=2)[:, -NEW:]
    assert not torch.equal(twin, found)


def test_behind_its_end_an_answer_is_filled_with_ends() -> None:
    model, batch = make_model().eval(), prompts()
    found = answers(model, batch)
    eos_id = int(found[2, 1])
    ended = answers(model, batch, eos_id=eos_id)
    for row, free in zip(ended.tolist(), found.tolist(), strict=True):
        length = free.index(eos_id) if eos_id in free else NEW
        assert row == free[:length] + [eos_id] * (NEW - length)
    alone = answers(model, rows_of(batch, 2), eos_id=eos_id)
    assert alone.shape == (1, NEW) and torch.equal(alone[0], ended[2])


def test_drawn_answers_follow_the_generator_and_the_likeliest_token_alone_is_the_greedy_one() -> None:
    model, batch = make_model().eval(), prompts()
    torch.manual_seed(3)
    first = answers(model, batch, temperature=2.0)
    torch.manual_seed(3)
    assert torch.equal(answers(model, batch, temperature=2.0), first)
    assert not torch.equal(answers(model, batch, temperature=2.0), first)
    assert torch.equal(answers(model, batch, temperature=2.0, top_p=1e-6), answers(model, batch))


def build_and_shard() -> GenerativeModel:
    """With tied embeddings, the values on rank 0 and shapes on the meta device elsewhere, as the engine builds it."""
    with torch.device("cpu" if collectives.rank() == 0 else "meta"):
        model = make_model(text=make_text(tie_word_embeddings=True)).eval()
    sharding.shard(model, init_device_mesh("cpu", (collectives.world_size(),)))
    return model


def sharded_rank() -> list[Tensor]:
    """Each rank has other prompts, whose answers end at another length."""
    model, batch = build_and_shard(), rows_of(prompts(), *SHARES[collectives.rank()])
    loss(model, batch).backward()
    names = [name for name, _ in model.named_parameters()]
    learned = [sharding.local([parameter.grad])[0] for parameter in model.parameters() if parameter.grad is not None]
    found = answers(model, batch, eos_id=ENDS_EARLY)
    with sharding.whole(model):  # where a forward pass exchanges nothing, one rank may ask alone
        again = answers(model, batch, eos_id=ENDS_EARLY) if collectives.rank() else found
    return [found, again, torch.tensor([len(names), len(learned)])]


SHARES = [0, 1, 2, 4], [3]
ENDS_EARLY = 54  # what the fourth prompt is answered with at once


@pytest.mark.slow
def test_ranks_that_share_the_weights_answer_in_lock_step() -> None:
    model = make_model(text=make_text(tie_word_embeddings=True)).eval()
    expected = answers(model, prompts(), eos_id=ENDS_EARLY)
    assert (expected[3] == ENDS_EARLY).all() and (expected[0] != ENDS_EARLY).all()  # one rank goes on for the other
    for rows, (found, again, numbers) in zip(SHARES, run_ranks(sharded_rank, 2), strict=True):
        assert torch.equal(found, expected[rows]) and torch.equal(again, found)
        assert numbers.tolist() == [len(list(model.parameters()))] * 2


# ---- what the plan and the engine ask


def test_flops_are_those_that_torch_counts() -> None:
    model, batch = make_model().eval(), make_batch(((1, 9),))
    as_model: Model = model
    assert as_model.modalities == () and model.dialogue.num_image_tokens == 4
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits(model, batch)
    assert sum(model.forward_flops(13).values()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dialogue_ids": lambda ids: ids.index_fill(1, torch.tensor([2]), 5)}, "row 0: 3 image tokens for 1 images"),
        ({"num_images": lambda numbers: numbers.flip(0) + 1}, "row 0: 4 image tokens for 2 images"),
        ({"images": lambda images: images[:, :1]}, "(5, 1, 3, 16, 16)"),
        ({"images": lambda images: images[:4]}, "(4, 2, 3, 16, 16)"),
        ({"images": lambda images: images[..., :8]}, "(5, 2, 3, 16, 8)"),
    ],
)
def test_images_that_do_not_fit_their_dialogues_are_refused(changes: dict[str, Any], told: str) -> None:
    batch: Any = make_batch()
    model = make_model()
    with pytest.raises(ConfigError) as caught:
        model(Batch(**{**batch, **{name: change(batch[name]) for name, change in changes.items()}}))
    assert told in str(caught.value) and caught.value.remedy
    del batch["images"]
    with pytest.raises(ConfigError, match="does not have the shape"):
        model(batch)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"context_length": 8}, "more than 8, the tokens of 2 images of 4"),
        ({"context_length": 65}, "at most 64"),
        ({"vision": ResNet(image={"size": 32}, layers=[1, 1, 1, 1], width=8)}, "ResNet"),
        ({"vision": VisionTransformer(image={"size": 16}, patch_size=8, pool="map", **SMALL)}, "pool=map"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_model(**changes)
    assert told in str(caught.value) and caught.value.remedy
