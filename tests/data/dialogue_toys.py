"""Small tokenizers of the kinds that language models have, with their chat templates, and dialogues."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlm_train.data.chat import Segment, Text, Token, Turn
from vlm_train.data.tokenizer import BytePairTokenizer, HuggingFaceTokenizer
from vlm_train.types import DialogueSpec

ASKED = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A red star."), Turn("user", "Sure?"),
         Turn("assistant", "Yes.")]  # fmt: skip
WITH_SYSTEM = [Turn("system", "Be brief."), *ASKED]
SPEC = DialogueSpec(context_length=4096, num_image_tokens=3, max_images=9)

# Texts in which newlines and spaces stand where templates end and answers begin, so that merges reach across.
CORPUS = [
    "\n\n\n\nassistant\n\n\nA red star.\nYes.\n\n  no  \n\n",
    "USER: What is it? ASSISTANT: A red star.</s>USER: Sure? ASSISTANT: Yes.</s>",
    "assistant\n  yes\n\n yes\n\n\n\nyes\n", ":  a red circle\n", "[/INST] A star\n", "[INST] What",
] * 8  # fmt: skip

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ '\n\n' }}"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ (first if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # its tokens take the newline behind them away
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<unk>",
]


def saved(inner: tokenizers.Tokenizer, path: Path) -> HuggingFaceTokenizer:
    """The tokenizer as a user has it: a folder that `HuggingFaceTokenizer` reads."""
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.save_pretrained(path)
    return HuggingFaceTokenizer(path=str(path), context_length=4096)


def byte_level(path: Path, *, special: list[str] = SPECIAL) -> HuggingFaceTokenizer:
    """As of GPT-2, Llama 3 or Qwen, but that a run of spaces is one word with what follows: more merges at borders."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\s+\w*|[^\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return saved(inner, path)


def spaced(path: Path, scheme: str, *, added: tuple[AddedToken, ...] = ()) -> HuggingFaceTokenizer:
    """As of Llama 2 and Mistral. `scheme`: where a space comes in front: `first`, of the text, or `always`, also behind
    special tokens (`legacy`). Its merges hold `</s>`, for the texts it was trained on do."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if scheme == "first" else "always")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    lines = [line for text in [*CORPUS, "a</s> e</s> i</s> o</s>"] for line in text.split("\n")]
    alphabet = sorted({letter for line in lines for letter in line if letter != " "} | set("▁<|>/_[]"))
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator(lines, trainer)
    learned = json.loads(inner.to_str())
    learned["added_tokens"] = []  # where training put the bytes, which are no special tokens
    inner = tokenizers.Tokenizer.from_str(json.dumps(learned))
    if scheme == "legacy":
        inner.pre_tokenizer = None
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    inner.add_special_tokens(list(added))
    return saved(inner, path)


def ours() -> BytePairTokenizer:
    return BytePairTokenizer.train(CORPUS, vocab_size=400, context_length=8)


def marked(segments: list[Segment]) -> str:
    """A dialogue as one reads it: what is learned in «», images as ⟨⟩."""
    found = ""
    for segment in segments:
        if not isinstance(segment, Text | Token):
            found += "⟨⟩"
            continue
        text = segment.text if isinstance(segment, Text) else segment.name
        found += f"«{text}»" if segment.is_learned else text
    return found.replace("»«", "")


words = st.one_of(
    st.sampled_from(
        ["", "A red star.", "Yes.", " yes", "\n\nyes", "\n", "  ", "no \n", "circle\n\n", "a  b", "🙂", "e\u0301"]
    ),
    st.text(st.characters(codec="utf-8", max_codepoint=0x2FFFF, exclude_characters="\0"), max_size=12),
    st.text(" \nayes.:", max_size=8),
)


@st.composite
def dialogues(draw: st.DrawFn, texts: st.SearchStrategy[str] = words, max_images: int = 2) -> list[Turn]:
    """One to three rounds; some answer has text."""
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        images = ["<image>\n"] * draw(st.integers(0, max_images))
        turns += [Turn("user", "".join(images) + draw(texts)), Turn("assistant", draw(texts))]
    if not any(turn.content.strip() for turn in turns if turn.role == "assistant"):
        turns[-1] = Turn("assistant", "yes")
    return turns
