"""A chat template of transformers writes a dialogue as our own template lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dialogue_toys import ASKED, CHATML, MISTRAL, SPEC, WITH_SYSTEM, byte_level, dialogues, ours
from hypothesis import HealthCheck, given, settings
from transformers.utils.chat_template_utils import render_jinja_template

from vlm_train.data.chat import IMAGE, TEMPLATES, Image, Text, Turn, render
from vlm_train.data.chat_jinja import jinja_of
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.types import Tokenizer

SYSTEMS = [None, "", 'Say "yes" or {{ no }}\nin STOP words.']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("bytes"))


def written(jinja: str, turns: list[Turn], *, answers: bool, **options: Any) -> str:
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(
        render_jinja_template([messages], chat_template=jinja, add_generation_prompt=not answers, **options)[0][0]
    )


def expected(name: str, turns: list[Turn], system: str | None, *, answers: bool) -> str:
    if system is not None and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    segments = render(turns, TEMPLATES[name], answers=answers)
    return "".join(IMAGE if isinstance(part, Image) else part.text if isinstance(part, Text) else part.name
                   for part in segments)  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=dialogues())
def test_it_writes_what_our_template_lays_out(
    tokenizer: Tokenizer, name: str, system: str | None, turns: list[Turn]
) -> None:
    jinja = jinja_of(DialogueEncoder(name, tokenizer, SPEC, system), tokenizer)
    assert written(jinja, turns, answers=True) == expected(name, turns, system, answers=True)
    assert written(jinja, turns[:-1], answers=False) == expected(name, turns[:-1], system, answers=False)


def test_parts_are_texts_and_images_before_a_new_line(tokenizer: Tokenizer) -> None:
    jinja = jinja_of(DialogueEncoder("chatml", tokenizer, SPEC), tokenizer)
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = render_jinja_template([[{"role": "user", "content": parts}]], chat_template=jinja)[0][0]
    assert text == written(jinja, [Turn("user", "<image>\nWhat is it?")], answers=True)


def test_a_token_that_the_tokenizer_lacks_ends_in_its_end_token() -> None:
    tokenizer = ours()
    for name in ("chatml", "vicuna", "plain"):
        jinja = jinja_of(DialogueEncoder(name, tokenizer, SPEC), tokenizer)
        assert "yes<|endoftext|>" in written(jinja, [Turn("user", "?"), Turn("assistant", "yes")], answers=True)


@pytest.mark.parametrize("own", [CHATML, MISTRAL])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_that_of_a_tokenizer_stays_with_our_system_before_it(own: str, system: str | None, tmp_path: Path) -> None:
    tokenizer: Any = byte_level(tmp_path)
    tokenizer.inner.chat_template = own
    jinja = jinja_of(DialogueEncoder("own", tokenizer, SPEC, system), tokenizer)
    options = {"bos_token": "<s>", "eos_token": "</s>"}
    turns = ASKED if system is None else WITH_SYSTEM
    assert written(jinja, ASKED, answers=True, **options) == written(own, turns, answers=True, **options)
    assert written(jinja, WITH_SYSTEM, answers=True, **options) == written(own, WITH_SYSTEM, answers=True, **options)
