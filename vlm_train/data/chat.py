"""Dialogues as they are written for a language model: turns to segments of text, tokens and images.

A template says what stands around what is said; `render` lays a dialogue out by it and marks what is learned: what the
assistant says, and the token that ends its turn. Nothing is tokenized here, so whatever a person writes stays text:
only a template speaks of tokens, and only `<image>` in what a user says stands for an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlm_train.data.decode import SampleError

IMAGE = "<image>"
MAX_DIALOGUE_CHARS = 1 << 20  # of a dialogue; several times the longest context

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "human": "user",
                           "gpt": "assistant"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. In what a user says each `<image>` stands for an image, in order; elsewhere it is text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Text:
    """Characters, tokenized together with those beside them."""

    text: str
    is_learned: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A special token by its string. One that is learned ends a turn of the assistant."""

    name: str
    is_learned: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """Where an image is read."""


Segment = Text | Token | Image


class Template(Protocol):
    """How dialogues are laid out: a `ChatTemplate`, or the one of a tokenizer (`data.chat_own`)."""

    @property
    def stop(self) -> str:
        """What ends an answer."""

    @property
    def stop_is_text(self) -> bool:
        """Whether that is text, not a special token."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Special tokens that it writes."""

    def lay_out(self, turns: Sequence[Turn], answers: bool) -> Iterator[Segment]:
        """The segments of turns whose order has been checked; without `answers` up to where the next one begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """What stands before and behind what each side says.

    `system`: None puts that text and an empty line before the first question. `system_text`: what it says where a
    dialogue does not. `stop` ends an answer, and is a token unless `stop_is_text`; the second half of `assistant`
    follows it. `tokens`: which strings in all these are special tokens. Without `keeps_questions` only the images stay
    of what is asked, and nothing of the system. Spaces that end the first half of `assistant` are left to the answer
    where one is to be written: most tokenizers join them to its first word.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    system_text: str = ""
    stop: str
    stop_is_text: bool = False
    tokens: tuple[str, ...] = ()
    keeps_questions: bool = True

    def lay_out(self, turns: Sequence[Turn], answers: bool) -> Iterator[Segment]:
        """See `Template`."""
        has_system = bool(turns) and turns[0].role == "system"
        system, turns = (turns[0].content, turns[1:]) if has_system else (self.system_text, turns)
        system = system if self.keeps_questions else ""
        if system and self.system is not None:
            yield from self._frame(self.system[0])
            yield Text(system)
            yield from self._frame(self.system[1])
            system = ""
        for turn in turns:
            if turn.role == "user":
                yield from self._question(turn, f"{system}\n\n" if system else "")
                system = ""
            else:
                yield from self._answer(turn)
        if not answers:
            yield from self._frame(self.assistant[0].rstrip(" "))

    def _question(self, turn: Turn, head: str) -> Iterator[Segment]:
        if not self.keeps_questions:
            yield from [Image()] * turn.content.count(IMAGE)
            return
        yield from self._frame(self.user[0])
        yield Text(head)
        yield from said(turn)
        yield from self._frame(self.user[1])

    def _answer(self, turn: Turn) -> Iterator[Segment]:
        yield from self._frame(self.assistant[0])
        yield from said(turn)
        yield Text(self.stop, is_learned=True) if self.stop_is_text else Token(self.stop, is_learned=True)
        yield from self._frame(self.assistant[1])

    def _frame(self, text: str) -> Iterator[Segment]:
        return frame(text, self.tokens)


def frame(text: str, tokens: Sequence[str]) -> Iterator[Segment]:
    """A template's own text as segments, cut at the special tokens in it; none of it is learned."""
    while text:
        found = [(place, -len(name), name) for name in tokens if (place := text.find(name)) >= 0]
        place, _, name = min(found, default=(len(text), 0, ""))  # the longest of those that begin there
        yield Text(text[:place])
        if name:
            yield Token(name)
        text = text[place + len(name) :]


def said(turn: Turn) -> Iterator[Segment]:
    """What a turn says as segments: text, and a user's images."""
    texts = turn.content.split(IMAGE) if turn.role == "user" else [turn.content]
    for place, text in enumerate(texts):
        if place:
            yield Image()
        yield Text(text, is_learned=turn.role == "assistant")


TEMPLATES = {
    # LLaVA's first stage (Liu et al. 2023, arXiv 2304.08485): the picture, then its caption
    "plain": ChatTemplate(user=("", ""), assistant=("", ""), stop="\n", stop_is_text=True, keeps_questions=False),
    # Vicuna 1.1 (github.com/lm-sys/FastChat), in which LLaVA-1.5 was tuned; nothing stands behind </s>
    "vicuna": ChatTemplate(
        system=("", " "),
        system_text="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", ""),
        stop="</s>",
    ),
    # github.com/meta-llama/llama3; what begins the text comes from the tokenizer
    "llama3": ChatTemplate(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        stop="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # ChatML with the words that Qwen 1.5 and 2 begin with (github.com/QwenLM)
    "chatml": ChatTemplate(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        system_text="You are a helpful assistant.",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "\n"),
        stop="<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    # the card of Mistral-7B-Instruct-v0.2, but no space behind </s>; later versions differ by a space: take `own`
    "mistral": ChatTemplate(
        user=("[INST] ", " [/INST]"), assistant=(" ", ""), stop="</s>", tokens=("[INST]", "[/INST]")
    ),
}


def render(turns: Sequence[Turn], template: Template, *, answers: bool = True) -> list[Segment]:
    """A dialogue laid out.

    Without `answers` it ends where the assistant is to begin: the answer to the last question is left out, those to
    earlier ones stay. Segments without text are left out.

    Raises:
        SampleError: dialogue_roles.
    """
    _check_order(turns)
    if not answers:
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            raise SampleError("dialogue_roles", got=_roles(turns), allowed="a question to answer")
    segments = template.lay_out(turns, answers)
    return [segment for segment in segments if not isinstance(segment, Text) or segment.text]


def turns_of(metadata: Mapping[str, Any], caption: str) -> list[Turn]:
    """The dialogue of a sample: `conversations` of KEY.json, or without one its image and then its caption.

    A turn is {role: system | user | assistant, content} or, as LLaVA keeps them, {from: system | human | gpt, value}.
    NUL characters go.

    Raises:
        SampleError: dialogue_roles when there are no turns, or not those of users and the assistant by turns from a
            user's on, behind one of the system at most; dialogue_text when a turn is no text; dialogue_too_long above
            `MAX_DIALOGUE_CHARS` characters.
    """
    listed = metadata.get("conversations")
    if listed is None:
        return [Turn("user", IMAGE), Turn("assistant", caption)]
    if not isinstance(listed, list):
        raise SampleError("dialogue_roles", got=str(listed)[:80], allowed="`conversations`: a list of turns")
    turns = [_turn(entry) for entry in listed]
    _check_order(turns)
    num_chars = sum(len(turn.content) for turn in turns)
    if num_chars > MAX_DIALOGUE_CHARS:
        raise SampleError("dialogue_too_long", got=f"{num_chars} characters", allowed=f"{MAX_DIALOGUE_CHARS}")
    return turns


def num_images(turns: Sequence[Turn]) -> int:
    """How many images a dialogue speaks of."""
    return sum(turn.content.count(IMAGE) for turn in turns if turn.role == "user")


def _turn(entry: Any) -> Turn:
    if not isinstance(entry, dict):
        raise SampleError("dialogue_roles", got=str(entry)[:80], allowed="a turn {role, content} or {from, value}")
    role, content = (
        (entry["role"], entry.get("content")) if "role" in entry else (entry.get("from"), entry.get("value"))
    )
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError("dialogue_roles", got=str(role)[:80], allowed=", ".join(_ROLES))
    if not isinstance(content, str):
        raise SampleError("dialogue_text", got=str(content)[:80], allowed="a string")
    try:
        content.encode("utf-8")  # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeError as error:
        raise SampleError("dialogue_text", got=error) from None
    return Turn(_ROLES[role], content.replace("\0", ""))


def _check_order(turns: Sequence[Turn]) -> None:
    said_by = [turn.role for turn in turns]
    rest = said_by[1:] if said_by[:1] == ["system"] else said_by
    if not rest or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(rest)):
        raise SampleError(
            "dialogue_roles",
            got=_roles(turns),
            allowed="user and assistant by turns, from a user on, behind one system",
        )


def _roles(turns: Sequence[Turn]) -> str:
    return ", ".join(turn.role for turn in turns)[:80] or "no turn"
