"""What else than a picture a scene gives: its depth, how it sounds, and how its objects move.

Objects come in turn, in drawing order, each in a slot of its own, so that a listener can tell which colour goes with
which shape. Sound: the shape is the pitch, the colour is the timbre (which two of five overtones ring), the size is the
loudness. Motion: an object circles round its place; the shape is how often, the colour how much its distance breathes.
Depth: what lies on top is nearer, and nearer is brighter.
"""

from __future__ import annotations

import io
import itertools
import random
import wave
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.data.modalities.members import AUDIO, DEPTH, MOTION
from vlm_train.data.scenes.world import COLORS, MOST_OBJECTS, SHAPES, Scene, SceneObject

NUM_SLOTS = MOST_OBJECTS
RATE, SLOT_SAMPLES = 8000, 800  # a slot is 0.1 s, a scene 0.5 s
SLOT_READINGS, NUM_CHANNELS = 20, 2
_LOWEST, _HIGHEST = 200.0, 640.0  # Hertz of the pitches; six times the highest is below half the rate
_OVERTONES = dict(zip(COLORS, itertools.combinations(range(2, 7), 2), strict=True))
_LOUDNESS = {"small": 0.2, "large": 0.35}
_FADE = 80  # samples

Masks = NDArray[np.bool_]


def depth_of(scene: Scene, masks: Masks, rng: random.Random) -> bytes:
    """A grey PNG of 8 bits; `masks` bool [N, S, S] as `render` gives them."""
    grey = np.full((scene.side, scene.side), 40, np.uint8)
    for number, mask in enumerate(masks, start=1):
        grey[mask] = 40 + 215 * number // len(masks)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def audio_of(scene: Scene, masks: Masks, rng: random.Random) -> bytes:
    """A WAV of 16 bits, one channel."""
    sound = np.zeros((NUM_SLOTS, SLOT_SAMPLES))
    for slot, item in zip(sound, scene.objects, strict=False):
        slot += _chord(item, rng)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(sound * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def motion_of(scene: Scene, masks: Masks, rng: random.Random) -> bytes:
    """NumPy's file of float32 [2, time]: x and y in 0..1; zeros while nothing moves."""
    path = np.zeros((NUM_SLOTS, NUM_CHANNELS, SLOT_READINGS), np.float32)
    for slot, item in zip(path, scene.objects, strict=False):
        slot[...] = _way(item, scene.side, rng)
    stream = io.BytesIO()
    np.save(stream, np.concatenate(path, axis=1), allow_pickle=False)
    return stream.getvalue()


SENSES: dict[str, tuple[str, Callable[[Scene, Masks, random.Random], bytes]]] = {
    "depth": (DEPTH, depth_of),
    "audio": (AUDIO[0], audio_of),
    "motion": (MOTION, motion_of),
}
"""Of each modality the member that holds it, and what makes it."""


def sense(scene: Scene, masks: Masks, key: str, modalities: Sequence[str]) -> dict[str, bytes]:
    """The members of these modalities; `key` seeds what chance decides in each."""
    made = ((name, *SENSES[name]) for name in modalities)
    return {member: make(scene, masks, random.Random(f"{name} {key}")) for name, member, make in made}


def _chord(item: SceneObject, rng: random.Random) -> NDArray[np.float64]:
    pitch = _LOWEST * (_HIGHEST / _LOWEST) ** (SHAPES.index(item.shape) / (len(SHAPES) - 1))
    pitch *= rng.uniform(0.99, 1.01)
    time = np.arange(SLOT_SAMPLES) / RATE
    tones = [np.sin(2 * np.pi * (pitch * multiple * time + rng.random())) for multiple in (1, *_OVERTONES[item.color])]
    ends = np.minimum(1, np.minimum(np.arange(SLOT_SAMPLES), np.arange(SLOT_SAMPLES)[::-1]) / _FADE)
    return np.sum(tones, axis=0) / len(tones) * ends * _LOUDNESS[item.size]


def _way(item: SceneObject, side: int, rng: random.Random) -> NDArray[np.float64]:
    time = np.arange(SLOT_READINGS) / SLOT_READINGS
    angle = 2 * np.pi * ((1 + SHAPES.index(item.shape) / 2) * time + rng.random())
    breath = np.cos(2 * np.pi * (1 + list(COLORS).index(item.color) / 2) * time)
    radius = item.radius / side * (1 + 0.5 * breath)
    return np.stack([item.x / side + radius * np.cos(angle), item.y / side + radius * np.sin(angle)]).round(4)
