"""What writes captions of pictures, and what tells how well they fit: runs of ours, and models of transformers.

Each has `source`, its name with a hash of its weights, which a table of captions keeps beside every caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessorList

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answering import Answerer
from vlm_train.evaluation.base import Embed
from vlm_train.evaluation.nucleus import KeyedNucleus, drawn_by
from vlm_train.evaluation.ranking import check_unit
from vlm_train.models.feature_store import weights_digest
from vlm_train.types import Batch, Grid

PROMPT = "Describe the picture."
"""What a model that reads questions is asked, where nothing else is said."""

Shown = Callable[[Any], Any]
"""A picture of the data whose header was read (`data.decode.EncodedImage`) -> what a model is shown of it."""

_PICTURES_PER_CALL = 64  # as many questions `Answerer` puts into one forward
_HASHED = 16  # hex digits of a hash of weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How the tokens of a caption are taken: the likeliest at `temperature` 0, else drawn from the nucleus `top_p`."""

    temperature: float = 1.0
    top_p: float = 0.9

    def nucleus(self, uniforms: NDArray[np.float64]) -> KeyedNucleus | None:
        """What draws by `uniforms` [N, T]; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        return KeyedNucleus(uniforms, temperature=self.temperature, top_p=self.top_p)

    def facts(self) -> dict[str, float | None]:
        """What of it decides a caption."""
        return {"temperature": self.temperature, "top_p": self.top_p if self.temperature else None}


class AnsweringCaptioner:
    """A generative model of ours.

    Args:
        answerer: the model.
        source: its name and the hash of its weights.
        shown: what of a picture `captions` reads.
        prompt: what it is asked; None: `PROMPT`, or nothing of a model that reads no questions.
        drawing: how tokens are taken.
        max_new_tokens: a caption that has not ended by then is cut off.

    Raises:
        ConfigError: a prompt for a model that reads none.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        source: str,
        shown: Shown,
        prompt: str | None,
        drawing: Drawing,
        max_new_tokens: int,
    ) -> None:
        asks = answerer.dialogues.reads_questions
        if prompt is not None and not asks:
            raise ConfigError("this model reads no prompt: it was trained on pictures and captions alone",
                              got=f"--prompt {prompt}", allowed="no --prompt, or a run of another data.template",
                              remedy="leave out --prompt")  # fmt: skip
        self._answerer, self._drawing, self._max_new_tokens = answerer, drawing, max_new_tokens
        self._prompt = (prompt or PROMPT) if asks else ""
        self.source, self.shown = source, shown
        self.settings: Mapping[str, Any] = {"prompt": self._prompt, **drawing.facts()}

    def captions(self, shown: Sequence[tuple[Tensor, Grid]], uniforms: NDArray[np.float64]) -> list[str | DataError]:
        """A caption for each of N pictures, or why it cannot be asked about.

        Args:
            shown: for each its images, uint8 [I, 3, S, S], and its tiles.
            uniforms: [N, max_new_tokens] in [0, 1).
        """
        found: list[str | DataError] = []
        for start in range(0, len(shown), _PICTURES_PER_CALL):
            some = slice(start, start + _PICTURES_PER_CALL)
            found += self._of_one_forward(shown[some], uniforms[some])
        return found

    def _of_one_forward(
        self, shown: Sequence[tuple[Tensor, Grid]], uniforms: NDArray[np.float64]
    ) -> list[str | DataError]:
        num_images = [len(images) for images, _ in shown]
        images = shown[0][0].new_zeros(len(shown), max(num_images), *shown[0][0].shape[1:])
        for row, (mine, _) in enumerate(shown):
            images[row, : len(mine)] = mine
        grids = torch.tensor([[grid] for _, grid in shown])
        batch = Batch(images=images, num_images=torch.tensor(num_images), grids=grids)
        prompts = [[self._prompt]] * len(shown)
        with drawn_by(self._answerer.model.text.network, self._drawing.nucleus(uniforms)):
            replies = self._answerer.answers(batch, prompts, max_new_tokens=self._max_new_tokens)
        return [reply for (reply,) in replies]


class TransformersCaptioner:
    """A model of transformers that writes about a picture (`AutoModelForImageTextToText`): BLIP, LLaVA and others.

    Args:
        path: a folder, or a name on the hub. Only safetensors are read, and no code.
        shown: what of a picture `captions` reads.
        prompt: where it has a chat template, the question (None: `PROMPT`); else how its captions begin, which is cut
            off them.
        drawing: how tokens are taken.
        max_new_tokens: a caption that has not ended by then is cut off.
        device: where it runs; in the precision that it was saved in, on a CPU in fp32.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        *,
        shown: Shown,
        prompt: str | None,
        drawing: Drawing,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        location = resolve_asset(path)
        self._processor = _processor(location)
        self._model = _model(location, torch.float32 if device.type == "cpu" else "auto").to(device)
        self._drawing, self._max_new_tokens, self._device = drawing, max_new_tokens, device
        self._text, self.shown = self._written(prompt), shown
        self.source = f"{Path(location).resolve().name}@{hash_of(self._model)}"
        self.settings: Mapping[str, Any] = {"prompt": self._text, **drawing.facts()}

    def _written(self, prompt: str | None) -> str:
        """What the model reads beside a picture."""
        if not getattr(self._processor, "chat_template", None):
            return f"{getattr(self._processor, 'image_token', '')}{prompt or ''}"
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt or PROMPT}]}]
        return str(self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def captions(self, shown: Sequence[NDArray[np.uint8]], uniforms: NDArray[np.float64]) -> list[str | DataError]:
        """A caption for each of N pictures.

        Args:
            shown: pixels of each, uint8 [H, W, 3].
            uniforms: [N, max_new_tokens] in [0, 1).
        """
        inputs = self._inputs([[Image.fromarray(pixels)] for pixels in shown])
        nucleus = self._drawing.nucleus(uniforms)
        with torch.no_grad():
            ids = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._max_new_tokens,
                logits_processor=LogitsProcessorList([nucleus] if nucleus else []),
            )
        decode = self._processor.tokenizer.batch_decode
        begins = decode(inputs["input_ids"], skip_special_tokens=True) if self._text else [""] * len(shown)
        told = decode(ids, skip_special_tokens=True)
        return [text.removeprefix(begin).strip() for text, begin in zip(told, begins, strict=True)]

    def _inputs(self, pictures: Sequence[Sequence[Image.Image]]) -> Any:
        """What the model reads of a picture each."""
        texts: dict[str, Any] = {}
        if self._text:
            begin = self._processor.tokenizer.bos_token
            is_begun = begin is not None and self._text.startswith(begin)
            texts = {"text": [self._text] * len(pictures), "add_special_tokens": not is_begun}
        return self._processor(images=pictures, return_tensors="pt", **texts).to(self._device, self._model.dtype)


class EmbeddingScorer:
    """How well texts fit a picture, by the cosine of a model that embeds both.

    Args:
        embedder: the model.
        source: its name and the hash of its weights.
        shown: what of a picture `scores` reads.
    """

    def __init__(self, embedder: Embed, *, source: str, shown: Shown) -> None:
        self._embedder, self.source, self.shown = embedder, source, shown

    def scores(self, shown: Sequence[NDArray[np.uint8]], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each of N pictures the cosine of each of its captions.

        Args:
            shown: pixels of each as the image tower reads them, uint8 [S, S, 3].
            captions: of each any number.
        """
        images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).contiguous()
        images_ND = self._embedder.images(Batch(images=images))
        texts_MD = self._embedder.texts([text for some in captions for text in some])
        for features in (images_ND, texts_MD):
            check_unit(features, "Features")
        rows_M = torch.tensor([row for row, some in enumerate(captions) for _ in some], device=images_ND.device)
        cosines = (images_ND[rows_M.long()] * texts_MD).sum(dim=1).tolist()
        ends = accumulate((len(some) for some in captions), initial=0)
        return [cosines[start:stop] for start, stop in pairwise(ends)]


def hash_of(model: nn.Module) -> str:
    """16 hex digits that tell a model's weights, as they were loaded."""
    return weights_digest(model).hex()[:_HASHED]


def _model(location: str, dtype: torch.dtype | str) -> Any:
    try:
        with hub_access(location):
            model = AutoModelForImageTextToText.from_pretrained(
                location, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except ValueError as error:
        raise _no_captioner(location, error) from error
    return model.eval()


def _processor(location: str) -> Any:
    try:
        with hub_access(location):
            found = AutoProcessor.from_pretrained(location, backend="pil", trust_remote_code=False)
    except (ImportError, ValueError) as error:
        raise _no_captioner(location, error) from error
    if not hasattr(found, "tokenizer"):
        raise _no_captioner(location, f"{type(found).__name__}, which has no tokenizer")
    return found


def _no_captioner(location: str, got: object) -> ConfigError:
    return ConfigError(
        f"{location} holds no model of transformers that writes about pictures",
        got=str(got).strip().splitlines()[0],
        allowed="a folder with weights (safetensors), processor and tokenizer of a model that "
        "AutoModelForImageTextToText takes, such as BLIP, LLaVA or Idefics2",
        remedy="--model FOLDER, or a run of ours: --run RUN",
    )
