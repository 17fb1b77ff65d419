"""`vlm-train predict run=RUN image=FILE prompt="..."`: ask a trained model about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_train.cli.arguments import Arguments
from vlm_train.cli.options import count, sentence
from vlm_train.cli.trained import choose_checkpoint, choose_device
from vlm_train.errors import ConfigError, DataError

MAX_NEW_TOKENS = 64


def main(run: Any, arguments: Arguments) -> int:
    """Prints the model's answer to each prompt."""
    prompts = [sentence("prompt=", text) for text in arguments.all("prompt", example='prompt="what is this?"')]
    where = arguments.required("image", example="image=FILE")
    max_new_tokens = arguments.optional("max_tokens", count(), MAX_NEW_TOKENS)

    import torch

    from vlm_train import build
    from vlm_train.evaluation.answering import Answerer
    from vlm_train.types import Batch

    device = choose_device(arguments.optional("device"))
    parts = build.load(run.path, checkpoint=choose_checkpoint(run, arguments.optional("checkpoint")))
    asked = build.interface(parts)(model=parts.model.to(device), device=device)
    if not isinstance(asked, Answerer):
        raise ConfigError(f"{type(parts.model).__name__} cannot answer", got=f"run={run.path}",
                          allowed="a run of a generative model, such as experiment=llava_tiny",
                          remedy='to search pictures by text: text="..." images=FOLDER')  # fmt: skip
    if not Path(where).is_file():
        raise ConfigError("image= is no file", got=where, allowed="an image file", remedy="image=FILE")
    try:
        images, grid = asked.open_picture(Path(where))
    except DataError as error:
        raise ConfigError("image= is no picture", got=error.got, allowed="an image file",
                          remedy="image=FILE") from error  # fmt: skip
    shown = Batch(images=images[None], num_images=torch.tensor([len(images)]), grids=torch.tensor([[grid]]))
    (replies,) = asked.answers(shown, [prompts], max_new_tokens=max_new_tokens)
    for reply in replies:
        if isinstance(reply, DataError):
            raise ConfigError("a prompt is too long for the model", got=reply.got, allowed=reply.allowed,
                              remedy="a shorter prompt=, or a smaller max_tokens=")  # fmt: skip
    for prompt, answer in zip(prompts, replies, strict=True):
        print(f"\n{prompt}\n  {answer}")
    return 0
