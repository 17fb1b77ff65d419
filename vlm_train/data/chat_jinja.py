"""How a run writes its dialogues, as a chat template of transformers: a program in Jinja, for an exported model.

What it takes: messages whose content is text, with `<image>` where an image is read, or the parts of a processor, texts
and images, each image followed by a new line as in a question of ours. One thing it cannot take over: where a text
spells out a special token, transformers reads the token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vlm_train.data.chat import IMAGE, TEMPLATES, ChatTemplate
from vlm_train.data.dialogue import OWN, DialogueEncoder
from vlm_train.data.pieces import inner_of
from vlm_train.types import Tokenizer

_SAID = (
    "{%- macro said(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{ NEW_IMAGE if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
).replace("NEW_IMAGE", json.dumps(f"{IMAGE}\n"))
_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system, turns = said(messages[0]), messages[1:] -%}"
    "{%- else -%}{%- set system, turns = DEFAULT, messages -%}{%- endif -%}"
)
_TURNS = (
    "{%- for turn in turns -%}{%- if turn['role'] == 'user' -%}QUESTION"
    "{%- else -%}{{ BEGIN + said(turn) + STOP }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ANSWER }}{%- endif -%}"
)
_OWN_SYSTEM = (
    "{%- if messages and messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': DEFAULT}] + messages -%}{%- endif -%}"
)


def jinja_of(encoder: DialogueEncoder, tokenizer: Tokenizer) -> str:
    """The chat template that writes prompts as `encoder` does, for the same `tokenizer`."""
    inner: Any = inner_of(tokenizer)
    if encoder.template == OWN:
        own = str(inner.chat_template)
        return own if encoder.system is None else _filled(_OWN_SYSTEM, {"DEFAULT": encoder.system}) + own
    template, eos_id = TEMPLATES[encoder.template], tokenizer.spec.eos_id
    stop = template.stop
    if encoder.stop_id == eos_id:  # which also stands for a token or a newline that the tokenizer has not
        stop = str(getattr(inner, "backend_tokenizer", inner).id_to_token(eos_id))
    return _SAID + _template(template, encoder.system, stop)


def _template(template: ChatTemplate, system: str | None, stop: str) -> str:
    default = template.system_text if system is None else system
    begin, behind = template.assistant
    question = "{{ '<image>' * (said(turn).split('<image>') | length - 1) }}"
    head = ""
    if template.keeps_questions:
        before, after = template.user
        question = _filled("{{ BEFORE + FIRST said(turn) + AFTER }}", {"BEFORE": before, "AFTER": after})
        first = "(system + '\\n\\n' if loop.first and system else '') +"
        if template.system is not None:
            front, back = template.system
            head = _filled("{%- if system -%}{{ FRONT + system + BACK }}{%- endif -%}", {"FRONT": front, "BACK": back})
            first = ""
        question = question.replace("FIRST", first)
    turns = _TURNS.replace("QUESTION", question)
    turns = _filled(turns, {"BEGIN": begin, "STOP": stop + behind, "ANSWER": begin.rstrip(" ")})
    return _filled(_SYSTEM, {"DEFAULT": default}) + head + turns


def _filled(text: str, words: Mapping[str, str]) -> str:
    """`text` with each name replaced by the literal of its words, at once, so that no word is taken for a name."""
    return re.sub("|".join(words), lambda name: json.dumps(words[name.group()], ensure_ascii=False), text)
