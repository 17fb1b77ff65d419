"""How a model is asked: each question of its own picture, cut at its end, on every rank as often as on the others."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation import answering
from vlm_train.evaluation.answering import Answerer, Pictures, Reply, check_asked
from vlm_train.evaluation.base import Embedder
from vlm_train.evaluation.retrieval import Retrieval
from vlm_train.evaluation.vqa import VisualQuestions, YesNo
from vlm_train.types import IMAGE_ID, WHOLE, Batch, Grid

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from generative_toys import NUM_TOKENS, SIZE, SPEC, make_model, make_text

STOP, CPU = 2, torch.device("cpu")
NEW = 5
QUESTIONS = [["what is it?", "red?"], [], ["how many circles are there?", "red?", "a b"], ["c"]]
SHARES = [slice(0, 3), slice(3, 4)], [slice(0, 4), slice(4, 4)]  # of rows by rank: unequal; all with one rank


class Words:
    """A letter is a token; the pictures come first. As many fit as the model takes, and so many tokens."""

    stop_id, reads_questions = STOP, True

    def question(self, text: str, grids: Pictures = (WHOLE,)) -> list[int]:
        ids = [1, *[IMAGE_ID] * NUM_TOKENS * len(grids), *(3 + ord(letter) % 60 for letter in text)]
        if len(grids) > 2 or len(ids) >= SPEC.context_length:
            raise DataError("dialogue_too_long", got=f"{len(ids)} tokens of {len(grids)} pictures")
        return ids


class Numbers:
    """Decodes to the ids themselves."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def pictures(num: int = len(QUESTIONS)) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (num, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return Batch(images=images, num_images=torch.ones(num, dtype=torch.int64))


def no_files(path: Path) -> Any:
    raise AssertionError(path)


def make_answerer(model: Any, **options: Any) -> Answerer:
    given: dict[str, Any] = {"dialogues": Words(), "tokenizer": Numbers(), "device": CPU, "open_picture": no_files}
    return Answerer(model=model, **{**given, **options})


def told(answerer: Answerer, batch: Batch, questions: list[list[str]]) -> list[list[Reply]]:
    return answerer.answers(batch, questions, max_new_tokens=NEW)


def asked_alone(model: Any, batch: Batch, questions: list[list[str]]) -> list[list[str]]:
    """What the model says to each question of each picture, one at a time, up to the first end."""
    told = []
    for row, texts in enumerate(questions):
        told.append([])
        for text in texts:
            ids = torch.tensor([Words().question(text)])
            length, one = torch.tensor([ids.shape[1]]), torch.tensor([1])
            image = batch["images"][row : row + 1]
            found = model.generate(image, one, ids, length, max_new_tokens=NEW, eos_id=STOP)[0].tolist()
            told[-1].append(" ".join(str(number) for number in found if number != STOP))
    return told


@pytest.mark.parametrize("per_forward", [1, 4, 64])
def test_each_question_is_answered_as_if_asked_alone(monkeypatch: pytest.MonkeyPatch, per_forward: int) -> None:
    monkeypatch.setattr(answering, "_QUESTIONS_PER_FORWARD", per_forward)
    model, batch = make_model().eval(), pictures()
    expected = asked_alone(model, batch, QUESTIONS)
    with mock.patch.object(model, "generate", wraps=model.generate) as generate:
        assert told(make_answerer(model), batch, QUESTIONS) == expected
    assert generate.call_count == -(-6 // per_forward)
    assert len({text for texts in expected for text in texts}) > 4
    assert [len(texts) for texts in expected] == [2, 0, 3, 1]
    turned = Batch(**{**batch, "images": batch["images"].roll(1, dims=0)})  # the twin: the picture before its own
    twin = told(make_answerer(model), turned, QUESTIONS)
    assert all(mine != other for mine, other in zip(expected, twin, strict=True) if mine)


def several_pictures() -> Batch:
    """Rows with two pictures, one, none and two."""
    batch = pictures()
    both = torch.stack([batch["images"], batch["images"].flip(0)], dim=1)
    return Batch(images=both, num_images=torch.tensor([2, 1, 0, 2]))


def test_a_question_is_asked_about_all_pictures_of_its_sample_and_about_none_where_there_is_none() -> None:
    model, batch = make_model().eval(), several_pictures()
    text = "how many circles are there?"
    questions = [[text], [text], [text, "what is it?"], [text]]
    found = told(make_answerer(model), batch, questions)
    for row, num in enumerate(batch["num_images"].tolist()):
        ids = torch.tensor([Words().question(text, [WHOLE] * num)])
        fields = batch["images"][row][None], torch.tensor([num]), ids, torch.tensor([ids.shape[1]])
        alone = model.generate(*fields, max_new_tokens=NEW, eos_id=STOP)[0].tolist()
        assert found[row][0] == " ".join(str(number) for number in alone if number != STOP)
    for place, changed in ((1, {0, 3}), (0, {0, 1, 3})):  # a picture that is there is read, and no other
        images = batch["images"].clone()
        images[:, place] = 255 - images[:, place]
        twin = told(make_answerer(model), Batch(images=images, num_images=batch["num_images"]), questions)
        assert {row for row in range(4) if twin[row] != found[row]} == changed


def test_a_question_that_does_not_fit_has_the_reason_in_place_of_its_answer_and_the_others_theirs() -> None:
    model, batch = make_model().eval(), several_pictures()
    too_long = "x" * SPEC.context_length
    expected = told(make_answerer(model), batch, QUESTIONS)
    with_it = [[too_long, *texts] for texts in QUESTIONS]
    for refused, *rest in told(make_answerer(model), batch, with_it):
        assert isinstance(refused, DataError) and refused.what == "dialogue_too_long"
        assert rest == expected.pop(0)
    for reply in make_answerer(model).blind_answers([("red?", [WHOLE] * 3), (too_long, ())]):
        assert isinstance(reply, DataError)
    room = model.text.context - len(Words().question("red?", ()))
    answerer = make_answerer(model)
    (fits,) = answerer.answers(batch, [[], [], ["red?"], []], max_new_tokens=room)[2]
    (too_many,) = answerer.answers(batch, [[], [], ["red?"], []], max_new_tokens=room + 1)[2]
    assert isinstance(fits, str) and isinstance(too_many, DataError) and "does not fit" in too_many.what
    with pytest.raises(ConfigError, match="does not fit"):  # the twin: what a model does that is asked all the same
        ids = torch.tensor([Words().question("red?", ())])
        fields = batch["images"][:1], torch.tensor([0]), ids, torch.tensor([ids.shape[1]])
        model.generate(*fields, max_new_tokens=room + 1, eos_id=STOP)


def test_blind_answers_are_those_to_pictures_of_the_mean_colour() -> None:
    model = make_model().eval()
    questions = [("red?", (WHOLE,)), ("red?", (WHOLE, WHOLE)), ("red?", ())]
    with mock.patch.object(answering, "MAX_NEW_TOKENS", NEW):
        found = make_answerer(model).blind_answers(questions)
    colour = (255 * torch.tensor(model.image_spec.mean)).round().to(torch.uint8)
    assert model.normalize(colour[None, :, None, None].expand(1, 3, SIZE, SIZE)).abs().max() < 0.01  # half a grey level
    images = colour[:, None, None].expand(3, 2, 3, SIZE, SIZE)
    batch = Batch(images=images, num_images=torch.tensor([1, 2, 0]))
    assert [[text] for text in found] == told(make_answerer(model), batch, [["red?"]] * 3)
    black = Batch(images=torch.zeros_like(images), num_images=batch["num_images"])  # the twin
    assert [[text] for text in found] != told(make_answerer(model), black, [["red?"]] * 3)


def test_pictures_in_maps_are_shown_as_maps_and_so_are_blank_ones() -> None:
    """A row has two pictures, of three images and of one, another one of its own."""
    model = make_model(max_tiles=2, tile_layout="map", text=make_text(max_position_embeddings=256),
                       context_length=256).eval()  # fmt: skip
    wide = Grid(1, 2, 2, 2)
    rows = [[wide, WHOLE], [WHOLE]]
    images = several_pictures()["images"].repeat(1, 2, 1, 1, 1)[:2]
    grids = torch.tensor([[wide, WHOLE], [WHOLE, (0,) * 4]])
    batch = Batch(images=images, num_images=torch.tensor([4, 1]), grids=grids)
    colour = (255 * torch.tensor(model.image_spec.mean)).round().to(torch.uint8)
    blank = colour[:, None, None].expand(images.shape)
    answerer = make_answerer(model, dialogues=Maps())
    with mock.patch.object(answering, "MAX_NEW_TOKENS", NEW):
        blind = answerer.blind_answers([("red?", row) for row in rows])
    for shown, found in ((images, told(answerer, batch, [["red?"]] * 2)), (blank, [[reply] for reply in blind])):
        for row, pictures in enumerate(rows):
            ids = torch.tensor([Maps().question("red?", pictures)])
            fields = shown[row][None], batch["num_images"][row][None], ids, torch.tensor([ids.shape[1]])
            alone = model.generate(*fields, max_new_tokens=NEW, eos_id=STOP, pictures=[pictures])[0].tolist()
            assert found[row] == [" ".join(str(number) for number in alone if number != STOP)]
    without = Batch(images=images, num_images=batch["num_images"])  # the twin: four pictures of one image
    assert told(answerer, without, [["red?"]] * 2) != told(answerer, batch, [["red?"]] * 2)


class Maps(Words):
    """Of pictures with tiles."""

    def question(self, text: str, grids: Pictures = (WHOLE,)) -> list[int]:
        num_tokens = sum(grid.num_tokens(NUM_TOKENS) for grid in grids)
        return [1, *[IMAGE_ID] * num_tokens, *(3 + ord(letter) % 60 for letter in text)]


class Scripted(nn.Module):
    """Says the same rows of ids whatever it is asked, and how it was asked."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.rows, self.seen = rows, []
        self.text = SimpleNamespace(context=SPEC.context_length)

    def generate(self, images: Tensor, num_images: Tensor, ids: Tensor, lengths: Tensor, **options: Any) -> Tensor:
        product = self.layer(torch.ones(1, 2))
        self.seen.append((self.training, product.requires_grad, product.dtype, ids, lengths, num_images, options))
        return torch.tensor(self.rows)


def test_an_answer_ends_at_its_end_and_one_without_is_cut_off() -> None:
    rows = [[7, 8, STOP, 9, STOP], [STOP, 7, 7, 7, 7], [7, 8, 9, 7, 8]]
    answerer = make_answerer(Scripted(rows))
    assert told(answerer, pictures(2), [["a", "b"], ["c"]]) == [["7 8", ""], ["7 8 9 7 8"]]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_answers_in_evaluation_mode_without_a_graph_and_is_left_as_it_was(training: bool) -> None:
    model = Scripted([[7], [7]]).train(training)
    answerer = make_answerer(model, autocast=torch.bfloat16)
    told(answerer, pictures(1), [["ab", "a"]])
    was_training, has_graph, dtype, ids, lengths, num_images, options = model.seen[0]
    assert (was_training, has_graph, dtype, model.training) == (False, False, torch.bfloat16, training)
    assert options == {"max_new_tokens": NEW, "eos_id": STOP, "pictures": [(WHOLE,)] * 2}
    assert lengths.tolist() == [7, 6] and num_images.tolist() == [1, 1]
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == [
        Words().question(text) for text in ("ab", "a")
    ]
    assert torch.is_grad_enabled()


def test_no_questions_need_no_model() -> None:
    assert told(make_answerer(None), pictures(3), [[], [], []]) == [[], [], []]


def test_as_many_lists_as_pictures_are_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        told(make_answerer(None), pictures(3), [["a"], ["b"]])
    assert caught.value.got == "2 lists" and "3" in str(caught.value.allowed)


def of_sharded_ranks() -> list[Any]:
    """Ranks share the weights, so one that asks less often keeps the others waiting; the toys' answers by rank."""
    model = make_model().eval()
    sharding.shard(model, init_device_mesh("cpu", (collectives.world_size(),)))
    found = []
    with mock.patch.object(answering, "_QUESTIONS_PER_FORWARD", 2):
        for shares in SHARES:
            rows = shares[collectives.rank()]
            # a rank without questions has a picture all the same, as its padding
            whole: Any = pictures() if QUESTIONS[rows] else pictures(1)
            batch = Batch(**{name: value[rows if QUESTIONS[rows] else slice(1)] for name, value in whole.items()})
            found.append(told(make_answerer(model), batch, QUESTIONS[rows] or [[]]))
        found.append(told(make_answerer(model), pictures(1), [[]]))  # nobody asks
        blind = [("red?", (WHOLE,)), ("what is it?", ()), ("a b", (WHOLE, WHOLE))][: 3 * (1 - collectives.rank())]
        with mock.patch.object(answering, "MAX_NEW_TOKENS", NEW):
            found.append(make_answerer(model).blind_answers(blind))
    return found


@pytest.mark.slow
def test_ranks_with_unequally_many_questions_wait_for_each_other() -> None:
    expected = asked_alone(make_model().eval(), pictures(), QUESTIONS)
    for rank, (unequal, one_alone, none, blind) in enumerate(run_ranks(of_sharded_ranks, 2, timeout=120)):
        assert unequal == expected[SHARES[0][rank]]
        assert one_alone == (expected if rank == 0 else [[]])
        assert none == [[]] and len(blind) == 3 * (1 - rank)


def test_an_evaluator_is_asked_only_of_a_model_that_can_tell() -> None:
    check_asked({"vqa": VisualQuestions(), "yes_no": YesNo()}, Answerer, "Toy")
    check_asked({"retrieval": Retrieval()}, Embedder, "Toy")
    check_asked({}, Answerer, "Toy")
    for evaluators, given, remedy in (
        ({"vqa": VisualQuestions(), "mine": Retrieval()}, Answerer, "evaluation=vqa"),
        ({"mine": YesNo()}, Embedder, "evaluation=retrieval"),
        ({"mine": object()}, Answerer, "evaluation=vqa"),  # who says nothing asks an embedder
    ):
        with pytest.raises(ConfigError, match="the evaluator mine asks what Toy cannot tell") as caught:
            check_asked(evaluators, given, "Toy")
        assert caught.value.remedy == remedy and given.__name__ in str(caught.value.allowed)
