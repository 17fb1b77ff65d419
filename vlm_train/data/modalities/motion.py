"""KEY.motion.npy: readings of a few channels over time, such as those of an accelerometer.

The file is NumPy's own, and only its header is trusted to NumPy: objects, which would be unpickled, and sizes that the
bytes do not have are refused before anything is made of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.members import MOTION
from vlm_train.data.transforms import Plan

MAX_READINGS = 1 << 26
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_motion(
    parts: Mapping[str, bytes], metadata: Mapping[str, Any], plan: Plan, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """float32 [C, T]: the middle of what is longer, zeros behind what is shorter; None where there is no motion.

    Raises:
        SampleError: motion_corrupt, also for other than C channels, no reading, or one that is not finite;
            motion_too_large above `MAX_READINGS`.
    """
    if MOTION not in parts:
        return None
    readings = decode_motion(parts[MOTION])
    num_channels, length = shape
    if readings.shape[0] != num_channels:
        raise SampleError("motion_corrupt", got=f"shape {readings.shape}", allowed=f"[{num_channels}, time]")
    start = max(0, readings.shape[1] - length) // 2
    kept = readings[:, start : start + length]
    return np.pad(kept, ((0, 0), (0, length - kept.shape[1])))


def decode_motion(data: bytes) -> NDArray[np.float32]:
    """[channels, time] of the file, whatever numbers it holds them in. Raises SampleError."""
    stream = io.BytesIO(data)
    try:
        shape, by_columns, dtype = _HEADERS[npy.read_magic(stream)](stream)
    except Exception as error:  # NumPy raises many kinds on bytes that are no header
        raise SampleError("motion_corrupt", got=error) from None
    size = math.prod(shape)
    if size > MAX_READINGS:
        raise SampleError("motion_too_large", got=f"shape {shape}", allowed=f"{MAX_READINGS} readings")
    start = stream.tell()
    if dtype.kind not in "fiu" or min(shape, default=0) < 0 or len(data) - start != size * dtype.itemsize:
        raise SampleError("motion_corrupt", got=f"{len(data) - start} bytes of {dtype} for shape {shape}",
                          allowed="as many numbers as its shape says")  # fmt: skip
    if len(shape) != 2 or not size:
        raise SampleError("motion_corrupt", got=f"shape {shape}", allowed="[channels, time], and readings in it")
    readings = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if by_columns else "C")
    with np.errstate(over="ignore"):
        readings = readings.astype(np.float32)
    if not np.isfinite(readings).all():
        raise SampleError("motion_corrupt", got="a reading that is not finite")
    return readings
