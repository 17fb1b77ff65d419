"""`vlm-train predict`: search pictures by text with a trained model, or ask it about some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli import answer
from vlm_train.cli.arguments import Arguments, parse
from vlm_train.cli.options import count, out_file, sentence
from vlm_train.cli.tables import table
from vlm_train.cli.trained import CHECKPOINT, DEVICE, RUN, choose_checkpoint, choose_device, open_run
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from vlm_train.data.gallery import Gallery
    from vlm_train.engine.pictures import Answer
    from vlm_train.evaluation.search import Index

USAGE = """usage: vlm-train predict run=RUN text="..." [text="..."] images=FOLDER|SHARDS [out=grid.png]
       vlm-train predict run=RUN image=FILE [image=FILE] prompt="..." [prompt="..."]

  vlm-train predict run=runs/quickstart/latest text="a red car" text="a blue car" images=photos out=grid.png
  vlm-train predict run=runs/quickstart/latest text="a happy face" images=data/openmoji/val
  vlm-train predict run=runs/llava_tiny/latest image=photo.png prompt="how many objects are there?"

Ranks every picture for each text by cosine, prints the best, and draws them; or answers questions about pictures, with
a generative model.

  run=RUN            {run}
  text=TEXT          what to look for; repeat it for several texts
  images=WHERE       a folder with images at any depth, one image, or shards (folder, glob, 'path/{{00000..00012}}.tar')
  out=FILE           where the picture is written (PNG); none is drawn if left out
  top=N              how many answers to each text; 8 if left out
  image=FILE         the picture that is asked about; repeat it to ask about several together; <image> in the prompt is
                     where each is spoken of, without it they come first
  prompt=TEXT        what is asked about it; repeat it for several questions
  max_tokens=N       an answer is cut off after so many tokens; {max_new_tokens} if left out
  checkpoint=PATH    {checkpoint}
  device=NAME        {device}"""

KEYS = {
    "run": "RUN", "text": "TEXT", "images": "WHERE", "out": "FILE", "top": "N", "checkpoint": "PATH", "device": "NAME",
    "image": "FILE", "prompt": "TEXT", "max_tokens": "N",
}  # fmt: skip
_NUM_UNUSABLE_SHOWN = 5


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE.format(run=RUN, checkpoint=CHECKPOINT, device=DEVICE, max_new_tokens=answer.MAX_NEW_TOKENS))
        return 0
    arguments = parse(words, KEYS, verb="predict", repeatable=("text", "image", "prompt"))
    _check_one_question(arguments)
    run = open_run(arguments.required("run", example="run=runs/quickstart/latest"))
    if "prompt" in arguments.values:
        return answer.main(run, arguments)
    texts = [sentence("text=", text) for text in arguments.all("text", example='text="a red car"')]
    where = arguments.required("images", example="images=FOLDER, or images=SHARDS")
    top, out = arguments.optional("top", count(), 8), arguments.optional("out", _png)

    from vlm_train.data.gallery import open_gallery

    gallery = open_gallery(where)
    index, features = _embed(run, arguments, gallery, texts)
    _tell_unusable(gallery, index)
    rows = _answers(gallery, index, features, texts, top, with_pixels=out is not None)
    for text, answers in rows:
        print(f"\n{text}")
        cells = [[str(rank), f"{answer.score:.4f}", answer.name] for rank, answer in enumerate(answers, 1)]
        print("\n".join(table(["rank", "score", "name"], cells, left=0)))
    if out is not None:
        from vlm_train.engine.pictures import search_grid

        subtitle = f"the best of {len(index.pictures):,} pictures, with their cosine"
        search_grid(rows, subtitle=subtitle).save(out)
        print(f"\nwritten: {out}")
    return 0


def _check_one_question(arguments: Arguments) -> None:
    """Refuses keys of a search beside those of a question."""
    asks = {"image", "prompt", "max_tokens"} & set(arguments.values)
    searches = {"text", "images", "out", "top"} & set(arguments.values)
    if asks and searches:
        raise ConfigError("predict either searches pictures or answers about some",
                          got=", ".join(sorted(asks | searches)),
                          allowed="text, images, out, top; or image, prompt, max_tokens",
                          remedy='image=FILE prompt="..."')  # fmt: skip
    if asks:
        arguments.all("prompt", example='prompt="how many objects are there?"')


def _png(name: str, text: str) -> Path:
    path = out_file(name, text)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{name} is drawn as PNG", got=text, allowed="a name that ends in .png",
                          remedy=f"{name}grid.png")  # fmt: skip
    return path


def _embed(run: Any, arguments: Arguments, gallery: Gallery, texts: list[str]) -> tuple[Index, Any]:
    """(the embedded gallery, unit features of the texts)."""
    from vlm_train import build
    from vlm_train.cli.progress import Ticker
    from vlm_train.data.gallery import as_seen
    from vlm_train.evaluation.search import index_pictures

    device = choose_device(arguments.optional("device"))
    parts = build.load(run.path, checkpoint=choose_checkpoint(run, arguments.optional("checkpoint")))
    if hasattr(parts.model, "dialogue"):
        raise ConfigError(f"{type(parts.model).__name__} answers, and does not search", got=f"run={run.path} text=...",
                          allowed="image=FILE and prompt=TEXT", remedy='image=FILE prompt="..."')  # fmt: skip
    embedder = build.embedder(parts, device)

    def load(number: int) -> Any:
        return as_seen(gallery.open(number), embedder.model.image_spec)

    features = embedder.texts(texts)
    return index_pictures(embedder, load, len(gallery), Ticker("pictures")), features


def _answers(
    gallery: Gallery, index: Index, features: Any, texts: list[str], top: int, *, with_pixels: bool
) -> list[tuple[str, list[Answer]]]:
    from vlm_train.engine.pictures import Answer
    from vlm_train.evaluation.search import search

    hits = search(index, features, top)
    shown = {hit.picture for row in hits for hit in row} if with_pixels else set()
    pixels = {picture: gallery.open(picture).decode() for picture in shown}
    return [
        (text, [Answer(name=gallery.name(hit.picture), score=hit.score, pixels=pixels.get(hit.picture)) for hit in row])
        for text, row in zip(texts, hits, strict=True)
    ]


def _tell_unusable(gallery: Gallery, index: Index) -> None:
    if not index.unusable:
        return
    print(f"{len(index.unusable)} of {len(gallery)} pictures could not be used:")
    for number, reason in index.unusable[:_NUM_UNUSABLE_SHOWN]:
        print(f"  {gallery.name(number)}: {reason}")
    if len(index.unusable) > _NUM_UNUSABLE_SHOWN:
        print(f"  and {len(index.unusable) - _NUM_UNUSABLE_SHOWN} more")
