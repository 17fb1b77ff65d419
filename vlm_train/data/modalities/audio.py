"""KEY.wav, flac, mp3 or ogg as a picture of sound: log-mel energies in windows of 25 ms, one every 10 ms.

Channels are averaged. Bands are laid out in Hertz, from 0 to 8,000, over the spectrum at the file's own rate, so a
sound has the same picture at any rate that can hold it and nothing is resampled. A longer sound gives its middle, a
shorter one is followed by silence. Windows, step and bands are those of AST and ImageBind (arXiv 2104.01778,
2305.05665).

Only the part that is wanted is decoded, so a header that claims hours costs nothing.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.members import audio_member
from vlm_train.data.transforms import Plan

STEP, WINDOW = 0.01, 0.025  # seconds
HIGHEST = 8000.0  # Hertz
FLOOR = 1e-10
"""What is quieter, as a share of a sine of amplitude 1, is as good as silence."""
MAX_SAMPLES = 1 << 24  # of all channels, in the part that is decoded
_MAX_RATE = 384_000
_RUN_UP = 1 << 15  # samples decoded before the first that is wanted: the frames of an MP3 lean on those before them
_FINEST = 16.0  # Hertz between two points of a spectrum, at most: no band of 128 is without one

_MAGICS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")
"""Beginnings of the four kinds of files; libsndfile knows two dozen more, which are kept from bytes of strangers."""


def read_audio(
    parts: Mapping[str, bytes], metadata: Mapping[str, Any], plan: Plan, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """float32 [M, T]: natural logarithms of the energy of M bands in T windows, so 10 ms x T of sound; None where there
    is no sound.

    Raises:
        SampleError: audio_corrupt, or audio_too_large for a file of so many channels or so high a rate that the part
            that is wanted has more than `MAX_SAMPLES` samples.
    """
    name = audio_member(parts)
    if name is None:
        return None
    num_bands, num_windows = shape
    return log_mel(*decode_audio(parts[name], num_windows * STEP + WINDOW), num_bands, num_windows)


def log_mel(samples: NDArray[np.float64], rate: int, num_bands: int, num_windows: int) -> NDArray[np.float32]:
    """float32 [M, T] of a sound [N] at `rate` samples a second; what it lacks is silence."""
    length = max(2, round(WINDOW * rate))
    starts = np.rint(np.arange(num_windows) * STEP * rate).astype(np.int64)
    padded = np.zeros(max(int(starts[-1]) + length, len(samples)))
    padded[: len(samples)] = samples
    shape = np.hanning(length + 1)[:-1]
    frames = padded[starts[:, None] + np.arange(length)] * shape
    num_points = 1 << max(length - 1, math.ceil(rate / _FINEST) - 1, 1).bit_length()
    power = np.abs(np.fft.rfft(frames, num_points, axis=1)) ** 2 * (2 / shape.sum()) ** 2
    # not BLAS: its sums depend on the number of threads, and so on who reads the sample
    energy = np.einsum("tf,mf->mt", power, _bands(num_bands, num_points, rate))
    return np.log(np.maximum(energy, FLOOR)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _bands(num_bands: int, num_points: int, rate: int) -> NDArray[np.float64]:
    """Triangles on the mel scale, [M, num_points / 2 + 1], each of mean 1 over the width that it has in Hertz."""
    edges = 700 * (10 ** (np.linspace(0, _mel(HIGHEST), num_bands + 2) / 2595) - 1)
    hertz = np.arange(num_points // 2 + 1) * (rate / num_points)
    low, centre, high = (edges[start : start + num_bands, None] for start in range(3))
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (rate / num_points) / (high - low) * 2


def _mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


def decode_audio(data: bytes, seconds: float) -> tuple[NDArray[np.float64], int]:
    """(samples, their rate): the middle `seconds` of a file, its channels averaged. Raises SampleError."""
    if not data.startswith(_MAGICS):
        raise SampleError("audio_corrupt", got=f"a file that begins with {data[:8]!r}", allowed="wav, flac, mp3, ogg")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_wanted = round(seconds * file.samplerate)
            if file.samplerate > _MAX_RATE or num_wanted * file.channels > MAX_SAMPLES:
                raise SampleError("audio_too_large", got=f"{file.channels} channels at {file.samplerate} Hz")
            start = max(0, file.frames - num_wanted) // 2
            file.seek(max(0, start - _RUN_UP))
            run_up = min(start, _RUN_UP)
            samples = file.read(run_up + num_wanted, dtype="float64", always_2d=True)[run_up:]
            num_there = min(num_wanted, file.frames)
            if len(samples) < max(1, num_there) or not np.isfinite(samples).all():
                raise SampleError("audio_corrupt", got=f"{len(samples)} samples", allowed=f"{num_there}, all finite")
            return samples.mean(axis=1), file.samplerate
    except SampleError:
        raise
    except Exception as error:  # libsndfile's, and those of files whose header lies
        raise SampleError("audio_corrupt", got=error) from None
