"""`vlm-train predict run=RUN image=FILE prompt="..."`: ask a trained model about one picture, or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.arguments import Arguments
from vlm_train.cli.options import count, sentence
from vlm_train.cli.trained import choose_checkpoint, choose_device
from vlm_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_train.evaluation.answering import Answerer
    from vlm_train.types import Batch

MAX_NEW_TOKENS = 64


def main(run: Any, arguments: Arguments) -> int:
    """Prints the model's answer to each prompt."""
    prompts = [sentence("prompt=", text) for text in arguments.all("prompt", example='prompt="what is this?"')]
    files = [_file(name) for name in arguments.all("image", example="image=FILE")]
    _check_places(prompts, len(files))
    max_new_tokens = arguments.optional("max_tokens", count(), MAX_NEW_TOKENS)

    from vlm_train import build
    from vlm_train.evaluation.answering import Answerer

    device = choose_device(arguments.optional("device"))
    parts = build.load(run.path, checkpoint=choose_checkpoint(run, arguments.optional("checkpoint")))
    asked = build.interface(parts)(model=parts.model.to(device), device=device)
    if not isinstance(asked, Answerer):
        raise ConfigError(f"{type(parts.model).__name__} cannot answer", got=f"run={run.path}",
                          allowed="a run of a generative model, such as experiment=llava_tiny",
                          remedy='to search pictures by text: text="..." images=FOLDER')  # fmt: skip
    dialogue: Any = parts.model.dialogue
    if len(files) > dialogue.max_images:
        raise ConfigError("the model was trained to read fewer pictures at once", got=f"{len(files)} image=",
                          allowed=f"{dialogue.max_images}, model.max_images of its run",
                          remedy="leave out some image=")  # fmt: skip
    (replies,) = asked.answers(_shown(asked, files), [prompts], max_new_tokens=max_new_tokens)
    for reply in replies:
        if isinstance(reply, DataError):
            raise ConfigError("a prompt is too long for the model", got=reply.got, allowed=reply.allowed,
                              remedy="a shorter prompt=, or a smaller max_tokens=")  # fmt: skip
    for prompt, answer in zip(prompts, replies, strict=True):
        print(f"\n{prompt}\n  {answer}")
    return 0


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise ConfigError("image= is no file", got=name, allowed="an image file", remedy="image=FILE")
    return Path(name)


def _check_places(prompts: list[str], num_pictures: int) -> None:
    """A prompt that says where its pictures stand says it of each."""
    from vlm_train.data.chat import IMAGE

    for prompt in prompts:
        if prompt.count(IMAGE) not in (0, num_pictures):
            raise ConfigError("prompt= speaks of another number of pictures than there are",
                              got=f"{prompt.count(IMAGE)} {IMAGE} in {prompt!r}, {num_pictures} image=",
                              allowed=f"an image= for each {IMAGE}; without any the pictures come first",
                              remedy=f"an image= for each, or leave {IMAGE} out")  # fmt: skip


def _shown(asked: Answerer, files: list[Path]) -> Batch:
    """The files as the pictures of one row."""
    import torch

    from vlm_train.types import Batch

    seen, grids = [], []
    for file in files:
        try:
            images, grid = asked.open_picture(file)
        except DataError as error:
            raise ConfigError("image= is no picture", got=f"{file}: {error.got}", allowed="an image file",
                              remedy="image=FILE") from error  # fmt: skip
        seen.append(images)
        grids.append(grid)
    images = torch.cat(seen)
    return Batch(images=images[None], num_images=torch.tensor([len(images)]), grids=torch.tensor([grids]))
