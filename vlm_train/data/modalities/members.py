"""Which members of a sample hold a modality: KEY.depth.png, one KEY.wav|flac|mp3|ogg, KEY.motion.npy."""

from __future__ import annotations

from collections.abc import Collection

DEPTH = "depth.png"
AUDIO = ("wav", "flac", "mp3", "ogg")
MOTION = "motion.npy"


def audio_member(parts: Collection[str]) -> str | None:
    """The one that is read: the first of `AUDIO` that is there."""
    return next((name for name in AUDIO if name in parts), None)


def modality_members(parts: Collection[str]) -> list[tuple[bytes, str]]:
    """(role in the uid, name) of each that is read of these parts, always in the same order."""
    wanted = ((b"d", DEPTH), (b"a", audio_member(parts)), (b"v", MOTION))
    return [(role, name) for role, name in wanted if name is not None and name in parts]
