"""What scenes sound, look from the side and move like: the same from the same scene, told apart by shape and colour."""

from __future__ import annotations

import dataclasses
import io
import json
import wave

import numpy as np
import pytest
from PIL import Image

from vlm_train.data.scenes import make_scenes
from vlm_train.data.scenes.make import Variant, make_sample
from vlm_train.data.scenes.render import render
from vlm_train.data.scenes.senses import RATE, SLOT_READINGS, SLOT_SAMPLES, sense
from vlm_train.data.scenes.world import COLORS, SHAPES, Scene, SceneObject
from vlm_train.errors import ConfigError

BALL = SceneObject(shape="circle", color="red", size="large", x=20.0, y=24.0, radius=9.0)
STAR = SceneObject(shape="star", color="blue", size="small", x=44.0, y=40.0, radius=6.0)
ALL = ("depth", "audio", "motion")


def members(*objects: SceneObject, key: str = "a") -> dict[str, bytes]:
    scene = Scene(side=64, background="plain", tones=((250, 250, 250),) * 2, texture_seed=0, objects=objects)
    return sense(scene, render(scene).masks, key, ALL)


def sound(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, 5 * SLOT_SAMPLES)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def spectrum(item: SceneObject, key: str) -> np.ndarray:
    part = sound(members(item, key=key)["wav"])[:SLOT_SAMPLES]
    return np.log(np.abs(np.fft.rfft(part * np.hanning(SLOT_SAMPLES))) + 0.3)


def test_a_listener_tells_every_shape_in_every_colour() -> None:
    """Each of the 90 is nearest to itself sung by another scene, and not nearest to a neighbour in the list."""
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    heard = [
        np.stack([spectrum(dataclasses.replace(BALL, shape=s, color=c), key) for s, c in kinds]) for key in ("a", "b")
    ]
    distance = np.linalg.norm(heard[0][:, None] - heard[1][None], axis=2)
    assert (distance.argmin(1) == np.arange(len(kinds))).mean() > 0.95  # measured 1.0
    shifted = np.roll(np.arange(len(kinds)), 1)
    assert (distance.argmin(1) == shifted).mean() < 0.05  # the twin


def test_objects_sound_and_move_in_turn() -> None:
    both, alone = members(BALL, STAR), members(BALL)
    first, second, rest = np.split(sound(both["wav"]), [SLOT_SAMPLES, 2 * SLOT_SAMPLES])
    assert np.array_equal(first, sound(alone["wav"])[:SLOT_SAMPLES]) and not sound(alone["wav"])[SLOT_SAMPLES:].any()
    assert np.abs(first).max() > np.abs(second).max() > 0.05 and not rest.any()  # large is loud
    path = np.load(io.BytesIO(both["motion.npy"]))
    assert path.shape == (2, 5 * SLOT_READINGS) and path.dtype == np.float32 and not path[:, 2 * SLOT_READINGS :].any()
    for number, item in enumerate((BALL, STAR)):
        way = path[:, number * SLOT_READINGS : (number + 1) * SLOT_READINGS]
        away = np.hypot(way[0] - item.x / 64, way[1] - item.y / 64)
        assert (away < 1.6 * item.radius / 64).all() and away.max() > 0.5 * item.radius / 64


def test_what_lies_on_top_is_nearer() -> None:
    over = dataclasses.replace(STAR, x=BALL.x + 5, y=BALL.y)
    grey = np.asarray(Image.open(io.BytesIO(members(BALL, over)["depth.png"])))
    masks = render(
        Scene(side=64, background="plain", tones=((250,) * 3,) * 2, texture_seed=0, objects=(BALL, over))
    ).masks
    places = (~masks.any(0), masks[0] & ~masks[1], masks[1])
    ground, ball, star = (set(grey[place].tolist()) for place in places)
    assert len(ground) == len(ball) == len(star) == 1 and max(ground) < max(ball) < max(star) == 255


def test_only_what_is_asked_for_is_made_and_nothing_else_changes(tmp_path) -> None:
    plain = make_sample(7, seed=1, size=48)[1]
    full = make_sample(7, seed=1, size=48, variant=Variant(modalities=ALL))[1]
    assert set(full) - set(plain) == {"depth.png", "wav", "motion.npy"} and plain.items() <= full.items()
    assert full == make_sample(7, seed=1, size=48, variant=Variant(modalities=ALL))[1]
    one = make_sample(7, seed=1, size=48, variant=Variant(modalities=["audio"]))[1]
    assert (
        one == {**plain, "wav": full["wav"]}
        and one["wav"] != make_sample(8, seed=1, size=48, variant=Variant(modalities=["audio"]))[1]["wav"]
    )
    for name, modalities in (("a", ["motion", "depth"]), ("b", ["depth", "motion"]), ("c", [])):
        make_scenes(tmp_path / name, num_samples=6, variant=Variant(modalities=modalities), num_workers=1)
    first, second, none = (json.loads((tmp_path / name / "dataset.json").read_text())["parameters"] for name in "abc")
    assert first == second == {**none, "modalities": ["depth", "motion"]} and "modalities" not in none
    with pytest.raises(ConfigError, match="no such modality"):
        make_scenes(tmp_path / "d", num_samples=6, variant=Variant(modalities=["smell"]))
