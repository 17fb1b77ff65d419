"""`vlm-train predict run=RUN image=FILE prompt="..."`: ask a trained model about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_train.cli.arguments import Arguments
from vlm_train.cli.options import count, plain
from vlm_train.cli.trained import choose_checkpoint, choose_device
from vlm_train.errors import ConfigError

MAX_NEW_TOKENS = 64


def main(run: Any, arguments: Arguments) -> int:
    """Prints the model's answer to each prompt."""
    prompts = [plain("prompt=", text) for text in arguments.all("prompt", example='prompt="what is this?"')]
    where = arguments.required("image", example="image=FILE")
    max_new_tokens = arguments.optional("max_tokens", count(), MAX_NEW_TOKENS)

    import torch

    from vlm_train import build
    from vlm_train.data.decode import SampleError
    from vlm_train.evaluation.answering import Answerer
    from vlm_train.types import Batch

    device = choose_device(arguments.optional("device"))
    parts = build.load(run.path, checkpoint=choose_checkpoint(run, arguments.optional("checkpoint")))
    asked = build.interface(parts)(model=parts.model.to(device), device=device)
    if not isinstance(asked, Answerer):
        raise ConfigError(f"{type(parts.model).__name__} cannot answer", got=f"run={run.path}",
                          allowed="a run of a generative model, such as experiment=llava_tiny",
                          remedy='to search pictures by text: text="..." images=FOLDER')  # fmt: skip
    asked.max_new_tokens = max_new_tokens
    pixels = torch.from_numpy(_pixels(where, parts.image_spec)).permute(2, 0, 1)[None]
    try:
        answers = asked.answers(Batch(images=pixels), [prompts])[0]
    except SampleError as error:
        raise ConfigError("a prompt is too long for the model", got=error.detail, allowed=error.allowed,
                          remedy="a shorter prompt=") from None  # fmt: skip
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"\n{prompt}\n  {answer}")
    return 0


def _pixels(where: str, image: Any) -> Any:
    """The one picture in `where`, as the model sees it: uint8 [S, S, 3]."""
    from vlm_train.data.gallery import as_seen, open_gallery

    if not Path(where).is_file():
        raise ConfigError("image= is no file", got=where, allowed="an image file", remedy="image=FILE")
    gallery = open_gallery(where)
    if len(gallery) != 1:
        raise ConfigError("image= is not one picture", got=f"{where}: {len(gallery)} pictures", allowed="a file",
                          remedy="image=FILE")  # fmt: skip
    return as_seen(gallery.open(0), image)
