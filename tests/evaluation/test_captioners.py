"""What writes captions: a run of ours and the folder that it is exported to say the same, batches do not matter, and
BLIP is read as transformers saves it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlm_train.data.decode import open_image
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.tiles import as_seen
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answering import Answerer
from vlm_train.evaluation.captioners import (
    PROMPT,
    AnsweringCaptioner,
    Drawing,
    EmbeddingScorer,
    TransformersCaptioner,
    hash_of,
)
from vlm_train.export.folders import export_model
from vlm_train.types import WHOLE

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from idefics2_toys import make_idefics
from llava_toys import answering, drawing, make_model, words

NEW, NUM, CPU = 12, 7, torch.device("cpu")
GREEDY = Drawing(temperature=0.0)
UNIFORMS = np.random.default_rng(0).random((NUM, NEW))


def pictures() -> list[Any]:
    found = []
    for number in range(NUM):
        stream = io.BytesIO()
        drawing(number).convert("RGB").resize((32, 32)).save(stream, "PNG")
        found.append(open_image(stream.getvalue()))
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return words()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer)


def own(model: Any, tokenizer: Any, how: Drawing, template: str = "chatml", prompt: str | None = None) -> Any:
    answerer = Answerer(model=model, dialogues=DialogueEncoder(template, tokenizer, model.dialogue, None),
                        tokenizer=tokenizer, device=CPU, open_picture=None)  # type: ignore[arg-type]  # fmt: skip

    def shown(image: Any) -> Any:
        return torch.from_numpy(as_seen(image, WHOLE, model.image_spec)).permute(0, 3, 1, 2), WHOLE

    return AnsweringCaptioner(answerer, source="ours@0", shown=shown, prompt=prompt, drawing=how, max_new_tokens=NEW)


def theirs(folder: Path, how: Drawing, prompt: str | None = None) -> TransformersCaptioner:
    return TransformersCaptioner(str(folder), shown=lambda image: image.decode(), prompt=prompt, drawing=how,
                                 max_new_tokens=NEW, device=CPU)  # fmt: skip


def said(captioner: Any, rows: list[int] | None = None, size: int = NUM) -> list[str]:
    """The captions of some pictures, so many at a time."""
    rows, all_pictures, found = rows or list(range(NUM)), pictures(), []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        found += captioner.captions([captioner.shown(all_pictures[row]) for row in some], UNIFORMS[some])
    return found


def test_a_caption_depends_on_its_picture_and_its_numbers_alone(model: Any, tokenizer: Any) -> None:
    captioner = own(model, tokenizer, Drawing())
    whole, other = said(captioner), [5, 0, 3]
    assert len(set(whole)) == NUM and all(whole)
    assert said(captioner, size=1) == said(captioner, size=3) == whole
    assert said(captioner, other) == [whole[row] for row in other]
    ids = torch.tensor([captioner._answerer.prompt(PROMPT, [WHOLE], NEW)])

    def by_torch(rows: list[int]) -> list[list[int]]:
        torch.manual_seed(0)
        images = torch.stack([captioner.shown(pictures()[row])[0] for row in rows])
        repeated, lengths = ids.expand(len(rows), -1), torch.full((len(rows),), ids.shape[1])
        options: Any = {"max_new_tokens": NEW, "eos_id": captioner._answerer.dialogues.stop_id, "temperature": 1.0}
        return model.generate(images, torch.ones(len(rows), dtype=torch.int64), repeated, lengths, **options).tolist()

    assert by_torch(other) != [by_torch(list(range(NUM)))[row] for row in other]  # the twin: torch's own generator


def test_the_likeliest_caption_is_what_the_model_answers(model: Any, tokenizer: Any) -> None:
    captioner = own(model, tokenizer, GREEDY)
    images = torch.stack([captioner.shown(image)[0] for image in pictures()])
    batch: Any = {"images": images, "num_images": torch.ones(NUM, dtype=torch.int64)}
    replies = captioner._answerer.answers(batch, [[PROMPT]] * NUM, max_new_tokens=NEW)
    assert said(captioner) == [reply for (reply,) in replies] != said(own(model, tokenizer, Drawing()))
    assert captioner.settings == {"prompt": PROMPT, "temperature": 0.0, "top_p": None}


@pytest.mark.parametrize("how", [GREEDY, Drawing(temperature=0.7, top_p=0.8)])
@pytest.mark.parametrize("make", [make_model, make_idefics])
def test_a_run_and_the_folder_that_it_is_exported_to_say_the_same(
    tokenizer: Any, tmp_path: Path, make: Callable[[Any], Any], how: Drawing
) -> None:
    model = make(tokenizer)
    # of a template that ends answers by the end of texts, since ours ends a text there whatever the template says
    export_model(answering(model, tokenizer, "vicuna"), target="transformers", out=tmp_path, verify=False)
    exported = theirs(tmp_path, how, "a red dog?")
    ours = said(own(model, tokenizer, how, "vicuna", "a red dog?"))
    assert [text.strip() for text in ours] == said(exported) == said(exported, size=2)
    assert said(theirs(tmp_path, how, "yes")) != said(exported)  # the twin: another question


def test_a_model_that_reads_no_questions_is_asked_none(model: Any, tokenizer: Any) -> None:
    assert own(model, tokenizer, GREEDY, "plain").settings["prompt"] == ""
    assert all(isinstance(text, str) for text in said(own(model, tokenizer, GREEDY, "plain")))
    with pytest.raises(ConfigError, match="reads no prompt"):
        own(model, tokenizer, GREEDY, "plain", prompt="what is it?")


def test_a_question_that_does_not_fit_is_the_reason_in_place_of_a_caption(model: Any, tokenizer: Any) -> None:
    found = said(own(model, tokenizer, GREEDY, prompt="a red square " * 100))
    assert len(found) == NUM and all(isinstance(each, DataError) for each in found)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of a few thousand weights as transformers saves it."""
    folder = tmp_path_factory.mktemp("blip")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "picture", "of", "red", "blue"]
    (folder / "vocab.txt").write_text("\n".join([*known, *(f"word{number}" for number in range(40))]) + "\n")
    size: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(known) + 40, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.BlipConfig(
        text_config={**size, **ids, "encoder_hidden_size": 16, "max_position_embeddings": 40, "projection_dim": 16},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        initializer_range=0.5,
    )
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_blip_captions_pictures_and_a_prompt_is_how_its_captions_begin(blip: Path) -> None:
    captioner = theirs(blip, Drawing())
    whole = said(captioner)
    assert len(set(whole)) == NUM and said(captioner, size=1) == said(captioner, size=3) == whole
    assert not any("[" in text for text in whole)
    assert captioner.source.startswith(f"{blip.name}@") and captioner.settings["prompt"] == ""
    begun = theirs(blip, Drawing(), "a picture of")
    assert said(begun) != whole and not any(text.startswith("a picture of") for text in said(begun))
    reference = transformers.BlipForConditionalGeneration.from_pretrained(blip)
    processor = transformers.AutoProcessor.from_pretrained(blip, backend="pil")
    inputs = processor(images=[Image.fromarray(each.decode()) for each in pictures()], return_tensors="pt")
    ids = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    greedy = [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert said(theirs(blip, GREEDY)) == greedy != whole


def test_another_weight_is_another_source(blip: Path) -> None:
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip)
    first = hash_of(model)
    assert theirs(blip, GREEDY).source == f"{blip.name}@{first}"
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert hash_of(model) != first


def test_a_folder_that_holds_no_captioner_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for path in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(ConfigError) as told:
            theirs(Path(path), GREEDY)
        assert told.value.allowed and told.value.remedy


class Embedding:
    """A picture's vector is its first pixel, a text's is its length."""

    def images(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch["images"][:, 0, 0, 0].long(), 4).float()

    def texts(self, texts: list[str]) -> torch.Tensor:
        found = [[0.6 if place == len(text) else 0.8 * (place == 3) for place in range(4)] for text in texts]
        return torch.tensor(found).reshape(-1, 4)


def test_scores_are_the_cosines_of_each_picture_with_its_own_captions() -> None:
    scorer = EmbeddingScorer(Embedding(), source="s@0", shown=lambda image: image)  # type: ignore[arg-type]
    shown = [np.full((2, 2, 3), value, np.uint8) for value in (0, 1, 2)]
    found = scorer.scores(shown, [["", "a"], [], ["ab", "a", "ab"]])
    assert [[round(score, 6) for score in some] for some in found] == [[0.6, 0.0], [], [0.6, 0.0, 0.6]]
    assert scorer.scores(shown, [[], [], []]) == [[], [], []]
