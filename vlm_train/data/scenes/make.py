"""Makes the *scenes* dataset: pictures of coloured shapes with the complete truth about them in KEY.json.

Sample i is a pure function of (seed, i, size, corruption), so a longer dataset begins with the shorter one. A sample is
in `val` when the hash of "SEED:i" falls below `val_fraction`. Scenes are drawn from one distribution: pictures do not
repeat across the split, but a short caption ("a red circle") may, so a retrieval score over scenes has a ceiling
below 100.

KEY.json: `captions` (each complete), `regions` [{phrase, box, class, attributes}] with the box of the visible pixels
(x1, y1 exclusive), `relations` [{subject, predicate, object}] by position in `regions`, `counts`, `negations` (true
statements of absence), `contrasts` [{true, false, type}] (a false caption beside its true twin), `negatives` (those
false captions; a type that is held out is left out of them, and so never trained on, and the captions are then the true
twins of those that are left), `qa`, `conversations`,
`contexts`, and `corruption` where the sample was damaged on purpose. Further modalities, if
wanted: see `senses`.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_train.data.parallel import map_in_processes
from vlm_train.data.scenes.claims import Listing, Thing, View
from vlm_train.data.scenes.corruption import check_corruption, corrupt_image, pick_corruption
from vlm_train.data.scenes.language import (
    COMPLETE,
    CONTRASTS,
    captions_of,
    contrasts_of,
    counts_of,
    negations_of,
    relations_of,
)
from vlm_train.data.scenes.questions import contexts_of, conversation_of, questions_of
from vlm_train.data.scenes.render import Rendering, box_of, render
from vlm_train.data.scenes.senses import SENSES, sense
from vlm_train.data.scenes.world import WHOLE, Scene, World, check_world, sample_scene
from vlm_train.data.writer import DatasetWriter, Progress, Summary, hash_fraction, to_json
from vlm_train.errors import ConfigError

SMALLEST_SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What makes a dataset another than the usual one.

    Args:
        corruption: kind (blur, noise, occlusion, caption_mismatch) to probability; none by default.
        hold_out: a type of contrast (`language.CONTRASTS`) that `negatives` shall not have.
        modalities: what a sample has beside picture and texts: some of depth, audio, motion.
        world: what there can be in a scene.
    """

    corruption: Mapping[str, float] = field(default_factory=dict)
    hold_out: str | None = None
    modalities: Sequence[str] = ()
    world: World = WHOLE

    def check(self) -> None:
        """Raises ConfigError."""
        check_corruption(self.corruption)
        check_world(self.world)
        if self.hold_out not in (None, *CONTRASTS):
            raise ConfigError("no such type of contrast", got=self.hold_out, allowed=", ".join(CONTRASTS))
        for name in self.modalities:
            if name not in SENSES:
                raise ConfigError("scenes have no such modality", got=name, allowed=", ".join(SENSES))

    def parameters(self) -> dict[str, Any]:
        """What is asked for, for dataset.json; what is not asked for is not told: datasets of before are the same."""
        told: dict[str, Any] = {"corruption": dict(self.corruption)}
        told |= {"hold_out": self.hold_out} if self.hold_out else {}
        told |= {"modalities": [name for name in SENSES if name in self.modalities]} if self.modalities else {}
        return told | ({"world": asdict(self.world)} if self.world != WHOLE else {})


USUAL = Variant()


def make_scenes(
    out: Path,
    *,
    num_samples: int,
    seed: int = 0,
    size: int = 64,
    val_fraction: float = 0.1,
    variant: Variant = USUAL,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Writes `OUT/train/*.tar`, `OUT/val/*.tar` and `OUT/dataset.json`.

    Args:
        out: the dataset directory.
        num_samples: scenes in all, both splits together.
        seed: another seed, another dataset.
        size: side of the pictures in pixels, at least 32.
        val_fraction: share of the scenes that go to `val`.
        variant: how it differs from the usual dataset.
        num_workers: processes; None is one for each core.
        progress: called after each scene.

    Raises:
        ConfigError: an argument out of its range.
        DataError: `out` holds something else.
    """
    variant.check()
    if num_samples < 1 or size < SMALLEST_SIDE or not 0 <= val_fraction < 1:
        got = {"num_samples": num_samples, "size": size, "val_fraction": val_fraction}
        raise ConfigError(
            "scenes cannot be made", got=got, allowed="num_samples >= 1, size >= 32, 0 <= val_fraction < 1"
        )
    parameters = {"dataset": "scenes", "num_samples": num_samples, "seed": seed, "size": size}
    with DatasetWriter(
        Path(out), parameters={**parameters, "val_fraction": val_fraction, **variant.parameters()}
    ) as writer:
        if writer.finished is not None:
            return writer.finished
        make = partial(make_sample, seed=seed, size=size, variant=variant)
        kinds: Counter[str] = Counter()
        for index, (kind, parts) in enumerate(map_in_processes(make, range(num_samples), num_workers=num_workers)):
            split = "val" if hash_fraction(f"{seed}:{index}") < val_fraction else "train"
            writer.add(split, f"{index:08d}", parts)
            kinds.update([kind] if kind else [])
            if progress is not None:
                progress(index + 1, num_samples)
        return writer.finish(facts={"num_corrupted": dict(sorted(kinds.items()))})


def make_sample(index: int, *, seed: int, size: int, variant: Variant = USUAL) -> tuple[str | None, dict[str, bytes]]:
    """The kind of corruption (or None) and the parts of scene `index`: `png`, `txt`, `json`, those of modalities."""
    world = variant.world
    scene, drawn, view = _see(f"scene {seed} {index}", size, world)
    image = drawn.image
    truth = describe(random.Random(f"text {seed} {index}"), view, variant)
    rng = random.Random(f"corruption {seed} {index}")
    kind = pick_corruption(rng, variant.corruption)
    if kind == "caption_mismatch":
        truth["corruption"] = {"kind": kind, "true_captions": truth["captions"]}
        truth["captions"] = _false_captions(rng, view, size, world)
    elif kind is not None:
        image, truth["corruption"] = corrupt_image(rng, image, kind)
    truth |= {"background": scene.background, "source": "scenes"}
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    parts = {"png": stream.getvalue(), "txt": truth["captions"][0].encode(), "json": to_json(truth)}
    return kind, parts | sense(scene, drawn.masks, f"{seed} {index}", variant.modalities)


def describe(rng: random.Random, view: View, variant: Variant) -> dict[str, Any]:
    """KEY.json of an undamaged scene."""
    hold_out, world = variant.hold_out, variant.world
    contrasts = contrasts_of(rng, view, world)
    held_out = {row["false"] for row in contrasts if row["type"] == hold_out}  # two types may give the same text
    questions = questions_of(rng, view, world)
    captions, trained = captions_of(rng, view), [row for row in contrasts if row["false"] not in held_out]
    twins = [row["true"] for row in trained if row["type"] in COMPLETE]
    return {
        "captions": twins if hold_out and twins else captions,
        "regions": [
            {
                "phrase": thing.name,
                "box": list(thing.box),
                "class": thing.shape,
                "attributes": [thing.color, thing.size],
            }
            for thing in view
        ],
        "relations": [{"subject": row[0], "predicate": row[1], "object": row[2]} for row in relations_of(view)],
        "counts": counts_of(view),
        "negations": negations_of(rng, view, world),
        "negatives": [row["false"] for row in trained],
        "contrasts": contrasts,
        "qa": questions,
        "conversations": conversation_of(rng, questions),
        "contexts": contexts_of(rng, view),
    }


def _see(key: str, size: int, world: World) -> tuple[Scene, Rendering, View]:
    scene = sample_scene(random.Random(key), size, world)
    drawn = render(scene)
    things = [Thing.of(item, box_of(mask), size) for item, mask in zip(scene.objects, drawn.masks, strict=True)]
    return scene, drawn, things


def _false_captions(rng: random.Random, view: View, size: int, world: World) -> list[str]:
    while True:
        _, _, other = _see(f"mismatch {rng.getrandbits(64)}", size, world)
        if not Listing(tuple(other)).verdict(view):
            return captions_of(rng, other)
