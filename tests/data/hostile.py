"""Makers of bad samples and bad tars. Images that claim to be huge are tiny files: only their headers lie."""

import io
import struct
import zlib

from data_fixtures import encoded, pixels
from PIL import Image, PngImagePlugin

HUGE = 8193  # one more than the side of the largest square that is taken


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, colour, *chunks):
    """A PNG with any header and the given (name, content) chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    framed = b"".join(_chunk(name, content) for name, content in ((b"IHDR", header), *chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + framed


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def deep_png(rows, colour):
    """16 bits a channel; `rows`: big-endian bytes of each row."""
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    samples = {0: 2, 2: 6}[colour]
    return png(len(rows[0]) // samples, len(rows), 16, colour, (b"IDAT", data))


def huge_png(width=HUGE, height=HUGE):
    return png(width, height, 8, 2, (b"IDAT", zlib.compress(bytes(100))))


def huge_jpeg(width=HUGE, height=HUGE):
    """A whole small JPEG whose frame header says another size."""
    data = bytearray(encoded(pixels(0)))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def huge_gif_screen(width=HUGE, height=HUGE):
    data = bytearray(encoded(pixels(0), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_gif_frame(width=HUGE, height=HUGE):
    """The screen is small, its first frame is not."""
    data = bytearray(encoded(pixels(0), "GIF"))
    frame = data.index(b"\x2c\0\0\0\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_webp(width=HUGE, height=HUGE):
    """A lossless WebP whose 14-bit sides lie."""
    data = bytearray(encoded(pixels(0), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<I", data, place, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(data)


def huge_bmp(width=HUGE, height=HUGE):
    data = bytearray(encoded(pixels(0), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def huge_ppm(width=HUGE, height=HUGE):
    return f"P6\n{width} {height}\n255\n".encode() + bytes(12)


BOMBS = {
    maker.__name__: maker
    for maker in (huge_png, huge_jpeg, huge_gif_screen, huge_gif_frame, huge_webp, huge_bmp, huge_ppm)
}


def text_bomb():
    """A PNG of a kilobyte with a comment that unpacks to 64 MiB."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "x" * (1 << 26), zip=True)
    return saved(Image.fromarray(pixels(0)), "PNG", pnginfo=notes)


def four_colours(array, kind):
    """A JPEG of cyan, magenta, yellow and key with Adobe's mark, as Photoshop writes it: with all values inverted. YCCK
    has, for the first three, luma and chroma of what is left after another inversion (Adobe note 5116); made as four
    plain components under a mark that says so."""
    cmyk = Image.fromarray(array).convert("CMYK")
    if kind == "CMYK":
        return saved(cmyk, "JPEG", quality=95)
    *inks, key = cmyk.split()
    luma = Image.merge("RGB", inks).convert("YCbCr").split()
    # Pillow inverts what it saves: right for the key, undone beforehand for the others
    planes = Image.merge("CMYK", [*(channel.point(lambda value: 255 - value) for channel in luma), key])
    data = bytearray(saved(planes, "JPEG", quality=95))
    mark = data.index(b"Adobe") + 11
    assert data[mark] == 0
    data[mark] = 2
    return bytes(data)


def many_scans(num_scans, image=None):
    """A JPEG that is followed by empty scans: each makes a progressive decoder go over the whole picture again."""
    data = encoded(pixels(0), progressive=True) if image is None else image
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + b"\xff\xd9"


TAR_END = bytes(1024)


def tar_header(name, size=0, *, kind=b"0", magic=b"ustar\x0000", size_field=None, signed=False, flags=()):
    """A header block with a right checksum. `size_field`: any 12 bytes; `flags`: (place, byte) set before it is summed;
    `signed`: summed as signed bytes."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = size_field or b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[148:157] = b" " * 8 + kind
    block[257:265] = magic
    for place, byte in flags:
        block[place] = byte
    block[148:156] = b"%06o\0 " % sum(memoryview(bytes(block)).cast("b" if signed else "B"))
    return bytes(block)


def tar_member(name, content, **header):
    return tar_header(name, len(content), **header) + padded(content)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax_header(content):
    """A PAX header of records, or of anything else."""
    return tar_member(b"PaxHeaders/x", content, kind=b"x")


def pax_record(keyword, value):
    length = len(keyword) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, keyword, value)


def tar_sample(key, seed, **header):
    """A usable sample of a picture and a caption."""
    image = encoded(pixels(seed))
    return tar_member(key + b".jpg", image, **header) + tar_member(key + b".txt", b"caption %d" % seed, **header)
