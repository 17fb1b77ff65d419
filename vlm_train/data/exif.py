"""Which way up a picture is, by its EXIF: the one tag of it that counts, read without a library.

EXIF is a TIFF file within the image (CIPA DC-008, TIFF 6.0): a byte order, the place of the first directory, and there
entries of 12 bytes, each a tag, a type, a count and a value. Cameras and editors leave all kinds of damage in the other
entries, and a library that reads them all warns of it.
"""

from __future__ import annotations

import struct

import numpy as np

_ORDERS = {b"II": "<", b"MM": ">"}
_HEADER = b"Exif\0\0"
_ORIENTATION = 0x0112
_VALUES = {3: "H", 4: "I"}  # types of one integer: 16 bits, as the standard has it, or 32


def orientation_of(exif: bytes | None) -> int:
    """EXIF orientation 1..8; 1 where there is none or it cannot be read, as viewers do."""
    data = (exif or b"").removeprefix(_HEADER).removeprefix(_HEADER)  # some writers put it there twice
    order = _ORDERS.get(data[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", data, place)
            if tag == _ORIENTATION and kind in _VALUES and count == 1:
                (value,) = struct.unpack_from(order + _VALUES[kind], data, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # it is cut off
        pass
    return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns [H, W, 3] as the orientation says (TIFF 6.0, tag 274)."""
    if orientation == 1:
        return pixels
    pixels = pixels.swapaxes(0, 1) if orientation > 4 else pixels
    down, right = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[orientation]
    return np.ascontiguousarray(pixels[::down, ::right])
