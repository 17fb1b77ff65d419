"""`vlm-train data recaption`: captions that models write of the pictures of shards, in a table beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.options import (
    MANY,
    Option,
    arguments,
    choice,
    count,
    local,
    needed,
    number,
    out_folder,
    plain,
    sentence,
    share,
    whole,
)
from vlm_train.cli.progress import Ticker
from vlm_train.cli.trained import choose_checkpoint, choose_device, open_run
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vlm_train.build import Parts
    from vlm_train.data.recaption import Captioner, Recipe, Scorer
    from vlm_train.data.recaption_folder import Recaptioned
    from vlm_train.data.sources.shards import ShardSource
    from vlm_train.evaluation.captioners import Drawing

    Options = Mapping[str, Any]

_HIGHEST_SEED = 2**63 - 1
_HOTTEST = 10.0
_TEMPERATURE, _TOP_P = 1.0, 0.9
_KNOWN = {
    "--out": Option(out_folder),
    "--run": Option(plain),
    "--checkpoint": Option(plain),
    "--model": Option(plain),
    "--prompt": Option(sentence),
    "--num-captions": Option(count(100), 1),
    "--temperature": Option(number(0.0, _HOTTEST), _TEMPERATURE),
    "--top-p": Option(share(zero=False, one=True)),
    "--max-tokens": Option(count(), 64),
    "--scorer": Option(plain),
    "--min-score": Option(number(-1.0, 1.0)),
    "--originals": Option(choice("keep", "drop"), "keep"),
    "--selection": Option(local),
    "--seed": Option(whole(0, _HIGHEST_SEED), 0),
    "--batch-size": Option(count(), 32),
    "--part-size": Option(count(MANY), 1024),
    "--device": Option(plain),
}


def make_table(words: list[str]) -> None:
    """Runs the action."""
    shards, options = arguments(words, {"SHARDS": plain}, _KNOWN, many=True)
    out = needed(options, "--out", "DIR")
    _check(options)
    write_table(shards, out, options)


def _check(options: Options) -> None:
    """Refuses options that contradict each other, before anything is loaded."""
    run, model, temperature = options["--run"], options["--model"], options["--temperature"]
    num_captions, top_p = options["--num-captions"], options["--top-p"]
    if (run is None) == (model is None):
        raise ConfigError("one model writes the captions", got="both" if run else "none",
                          allowed="--run RUN, or --model FOLDER of transformers",
                          remedy="leave out --model" if run else "add --run RUN")  # fmt: skip
    if model is not None and options["--checkpoint"] is not None:
        raise ConfigError("--checkpoint is for --run", got=f"--model {model} --checkpoint {options['--checkpoint']}",
                          allowed="a folder is one model", remedy="leave out --checkpoint")  # fmt: skip
    if options["--min-score"] is not None and options["--scorer"] is None:
        raise ConfigError("nothing scores the captions", got=f"--min-score {options['--min-score']}, no --scorer",
                          allowed="--min-score with --scorer RUN", remedy="add --scorer RUN")  # fmt: skip
    if temperature == 0 and num_captions > 1:
        raise ConfigError("the likeliest caption is one", got=f"--temperature 0 --num-captions {num_captions}",
                          allowed="--num-captions 1, or a temperature above 0", remedy="--temperature 1")  # fmt: skip
    if temperature == 0 and top_p is not None:
        raise ConfigError("where the likeliest token is taken none is drawn",
                          got=f"--temperature 0 --top-p {top_p}", allowed="a temperature above 0",
                          remedy="leave out --top-p")  # fmt: skip


def write_table(shards: Sequence[str], out: Path, options: Options) -> None:
    """Loads the models, captions, and tells what came out."""
    from transformers.utils import logging

    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.recaption import Recipe, recaption
    from vlm_train.data.sources.shards import ShardSource

    logging.disable_progress_bar()
    device = choose_device(options["--device"])
    open_manifest(shards, progress=Ticker("MB indexed"))
    source = ShardSource(shards=shards)
    rows = _rows(source, options["--selection"])
    recipe = Recipe(
        num_captions=options["--num-captions"],
        max_new_tokens=options["--max-tokens"],
        seed=options["--seed"],
        originals=options["--originals"] == "keep",
        min_score=options["--min-score"],
        part_size=options["--part-size"],
    )
    found = recaption(
        source,
        rows,
        out,
        captioner=_captioner(options, recipe, device),
        scorer=None if options["--scorer"] is None else _scorer(options["--scorer"], device),
        recipe=recipe,
        batch_size=options["--batch-size"],
        progress=Ticker("samples"),
    )
    _tell(found, num_repeats=len(source) - len(rows) if options["--selection"] is None else 0)


def _rows(source: ShardSource, where: Path | None) -> NDArray[np.int64]:
    """The rows to caption: those of a selection, each content once."""
    import numpy as np

    from vlm_train.data.selection import Selection

    selection = Selection.all(len(source)) if where is None else Selection.load(where, source.fingerprint)
    rows = selection.kept(0, len(source))
    _, first = np.unique(source.manifest.uids(rows).view("S16").reshape(-1), return_index=True)
    return rows[np.sort(first)]


def _captioner(options: Options, recipe: Recipe, device: torch.device) -> Captioner:
    from vlm_train.evaluation.captioners import Drawing, TransformersCaptioner

    top_p = _TOP_P if options["--top-p"] is None else options["--top-p"]
    drawing = Drawing(temperature=options["--temperature"], top_p=top_p)
    if options["--run"] is not None:
        return _own_captioner(options, drawing, recipe, device)
    return TransformersCaptioner(
        options["--model"],
        shown=lambda image: image.decode(),
        prompt=options["--prompt"],
        drawing=drawing,
        max_new_tokens=recipe.max_new_tokens,
        device=device,
    )


def _own_captioner(options: Options, drawing: Drawing, recipe: Recipe, device: torch.device) -> Captioner:
    import torch

    from vlm_train import build
    from vlm_train.data.tiles import as_seen, grid_of
    from vlm_train.evaluation.answering import Answerer
    from vlm_train.evaluation.captioners import AnsweringCaptioner

    parts, source = _loaded(options["--run"], options["--checkpoint"], key="--run")
    answerer = build.interface(parts)(model=parts.model.to(device), device=device)
    if not isinstance(answerer, Answerer):
        raise ConfigError(f"{type(parts.model).__name__} writes no captions", got=f"--run {options['--run']}",
                          allowed="a run of a generative model, such as experiment=llava_tiny",
                          remedy="as a judge of captions it is --scorer RUN")  # fmt: skip
    dialogue, spec = build.dialogues(parts).spec, parts.image_spec

    def shown(image: Any) -> Any:
        grid = grid_of(image.width, image.height, dialogue)
        return torch.from_numpy(as_seen(image, grid, spec)).permute(0, 3, 1, 2), grid

    return AnsweringCaptioner(
        answerer,
        source=source,
        shown=shown,
        prompt=options["--prompt"],
        drawing=drawing,
        max_new_tokens=recipe.max_new_tokens,
    )


def _scorer(run: str, device: torch.device) -> Scorer:
    from vlm_train import build
    from vlm_train.data.gallery import as_seen
    from vlm_train.evaluation.captioners import EmbeddingScorer

    parts, source = _loaded(run, None, key="--scorer")
    if hasattr(parts.model, "dialogue"):
        raise ConfigError(f"{type(parts.model).__name__} writes, and does not score", got=f"--scorer {run}",
                          allowed="a run of a model that embeds pictures and texts, such as experiment=quickstart",
                          remedy=f"to write captions: --run {run}")  # fmt: skip
    spec = parts.image_spec
    return EmbeddingScorer(build.embedder(parts, device), source=source, shown=lambda image: as_seen(image, spec))


def _loaded(path: str, checkpoint: str | None, *, key: str) -> tuple[Parts, str]:
    """A trained run, and its name with a hash of its weights."""
    from vlm_train import build
    from vlm_train.engine import checkpoints

    run = open_run(path, key=key)
    chosen = choose_checkpoint(run, checkpoint)
    parts = build.load(run.path, checkpoint=chosen)
    told = parts.config.run
    name = f"{told.experiment}/{told.id or run.path.resolve().name}"
    return parts, f"{name}@{checkpoints.identity(chosen)}"


def _tell(found: Recaptioned, num_repeats: int) -> None:
    facts = found.facts
    state = "is there already" if found.already_there else "written"
    print(f"{found.directory} {state}: captions of {facts['num_rows']} samples, {facts['num_original']} original and "
          f"{facts['num_synthetic']} by {facts['captioner']}")  # fmt: skip
    if facts["min_score"] is not None:
        print(f"below {facts['min_score']:g} by {facts['scorer']} were {facts['num_original_dropped']} original and "
              f"{facts['num_synthetic_dropped']} new ones; {facts['num_without']} samples have none left")  # fmt: skip
    if num_repeats:
        print(f"{num_repeats} samples repeat others and share their rows")
    for key, what in (("num_empty", "captions said nothing"), ("num_repeated", "captions repeated another")):
        if facts[key]:
            print(f"{facts[key]} {what} and are left out")
    if facts["num_skipped"]:
        from vlm_train.data.recaption_folder import ERRORS

        reasons = ", ".join(f"{reason} {num}" for reason, num in facts["skipped"].items())
        print(f"{facts['num_skipped']} samples were skipped ({reasons}): {found.directory / ERRORS}")
    print(f"next: data.captions={found.directory}")
