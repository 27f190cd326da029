"""Image files of every kind that people have, and odd ones: what Python and C++ have to read alike."""

import io
import itertools
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {}/></x:xmpmeta>'
XMP_ELEMENT = "<x:xmpmeta><tiff:Orientation>{}</tiff:Orientation></x:xmpmeta>"


def xmp(orientation):
    return XMP.format(f'tiff:Orientation="{orientation}"')


def exif(orientation):
    found = Image.Exif()
    if orientation:
        found[ORIENTATION] = orientation
    else:
        found[0x010E] = "a camera that does not know how it was held"
    return found


def tiff(orientation, kind="H", big=True, count=1):
    """TIFF data with the orientation alone, as a number of another size or byte order than Pillow writes."""
    order, types = ">" if big else "<", {"B": 1, "H": 3, "L": 4}
    values = struct.pack(f"{order}{count}{kind}", *[orientation] * count)
    body = struct.pack(f"{order}HHHL", 1, ORIENTATION, types[kind], count)
    body += values.ljust(4, b"\0") if len(values) <= 4 else struct.pack(f"{order}L", 26)
    rest = values if len(values) > 4 else b""
    return (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}L", 8) + body + struct.pack(f"{order}L", 0) + rest


def chunk(kind, data=b""):
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def packed(rows, depth):
    """Rows [H, n] of numbers below 2^depth as PNG stores them: a filter byte, 0, before each."""
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(len(rows), -1)
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)


def png(pixels, depth, before=(), after=(), interlaced=False, pieces=1):
    """A PNG file of pixels [H, W, C], numbers below 2^depth; with chunks before and after the image's own.

    Pillow writes no 16-bit colours, no interlaced files, and no data in pieces.
    """
    height, width, channels = pixels.shape
    kinds = [b"PLTE" for data in before if data[4:8] == b"PLTE"]
    colour = 3 if kinds else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    grids = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row and column, and the steps between them
        grids = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[row::down, column::right] for row, column, down, right in grids]
    data = zlib.compress(b"".join(packed(part.reshape(len(part), -1), depth) for part in parts if part.size))
    cuts = [len(data) * i // pieces for i in range(pieces + 1)]
    body = [chunk(b"IDAT", data[a:b]) for a, b in itertools.pairwise(cuts)]
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *before, *body, *after, chunk(b"IEND")])


def jpeg(image, *segments, without=None, **options):
    """A JPEG file; with (marker, data) segments after its start, and without those of one marker."""
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    data = buffer.getvalue()
    rest = data[2:]
    while without and rest[:1] == b"\xff" and rest[1] != 0xDA:
        length = 2 + struct.unpack(">H", rest[2:4])[0]
        if rest[1] == without:
            data = data.replace(rest[:length], b"", 1)
        rest = rest[length:]
    made = [b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body for marker, body in segments]
    return data[:2] + b"".join(made) + data[2:]


def save_pictures(folder):
    """Writes pictures of blurred noise: [paths]."""
    random = np.random.default_rng(0)
    paths = []

    def noise(height, width):
        blobs = Image.fromarray(random.integers(0, 256, (5, 5, 4), dtype=np.uint8), "RGBA")
        return np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC))

    def save(name, image, **options):
        paths.append(folder / name)
        if isinstance(image, bytes):
            paths[-1].write_bytes(image)
        else:
            image.save(paths[-1], **options)

    rgb = [Image.fromarray(noise(*size)[..., :3]) for size in ((32, 32), (60, 91), (101, 64), (20, 15), (640, 801))]
    rgba, wide = noise(50, 71), rgb[1]
    for number, image in enumerate(rgb):
        save(f"rgb_{number}.png", image)
    save("rgba.png", Image.fromarray(rgba))
    save("grey.png", wide.convert("L"))
    save("grey_alpha.png", Image.fromarray(rgba).convert("LA"))
    save("grey_16_bit.png", Image.fromarray(random.integers(0, 65536, (40, 51)).astype(np.uint16)))
    save("black_and_white.png", wide.convert("1"))
    save("palette.png", rgb[2].quantize(40))
    save("palette_4_bit.png", rgb[2].quantize(11))
    save("palette_transparent.png", rgb[2].quantize(40), transparency=7)
    save("palette_translucent.png", rgb[2].quantize(40), transparency=bytes(range(0, 240, 6)))
    save("rgb_transparent.png", rgb[0], transparency=rgb[0].getpixel((3, 4)))
    save("grey_transparent.png", rgb[0].convert("L"), transparency=rgb[0].convert("L").getpixel((3, 4)))
    save("animated.png", wide, save_all=True, append_images=[rgb[0].resize(wide.size)])
    sixteen = rgba.astype(np.uint16) * 256 + random.integers(0, 256, rgba.shape)
    for name, channels in (("grey_alpha", [0, 3]), ("rgb", [0, 1, 2]), ("rgba", [0, 1, 2, 3])):
        save(f"{name}_16_bit.png", png(sixteen[..., channels], 16))
    for depth in (1, 2, 4):
        save(f"grey_{depth}_bit.png", png(rgba[..., :1] >> 8 - depth, depth))
    save("interlaced.png", png(rgba[..., :3], 8, interlaced=True))
    save("interlaced_alpha.png", png(rgba, 8, interlaced=True))
    save("interlaced_16_bit.png", png(sixteen[..., :1], 16, interlaced=True))
    save("in_pieces.png", png(rgba, 8, pieces=9))
    save("gamma.png", png(rgba, 8, [chunk(b"gAMA", struct.pack(">L", 100000)), chunk(b"prVt", b"not known")]))

    for orientation in range(1, 9):
        save(f"turned_{orientation}.png", wide, exif=exif(orientation))
        save(f"turned_{orientation}.jpg", wide, exif=exif(orientation), quality=90)
        save(f"turned_by_xmp_{orientation}.jpg", wide, xmp=xmp(orientation).encode(), quality=90)
    pixels = np.asarray(wide)
    text = b"XML:com.adobe.xmp\0"
    compressed = zlib.compress(XMP_ELEMENT.format(8).encode())
    raw = f"\nexif\n{len(tiff(6)):8}\n{tiff(6).hex()}\n".encode()
    for name, *chunks in (
        ("xmp", chunk(b"iTXt", text + b"\0\0\0\0" + xmp(6).encode())),
        ("xmp_translated", chunk(b"iTXt", text + b"\0\0en\0packet\0" + xmp(5).encode())),
        ("xmp_compressed", chunk(b"iTXt", text + b"\1\0\0\0" + compressed)),
        ("raw_profile", chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))),
        ("exif_and_xmp", chunk(b"iTXt", text + b"\0\0\0\0" + xmp(6).encode()), chunk(b"eXIf", tiff(3))),
        ("upright_exif_and_xmp", chunk(b"iTXt", text + b"\0\0\0\0" + xmp(6).encode()), chunk(b"eXIf", tiff(1))),
        ("exif_long", chunk(b"eXIf", tiff(6, "L"))),
        ("exif_little_long", chunk(b"eXIf", tiff(7, "L", big=False))),
        ("exif_three", chunk(b"eXIf", tiff(6, "H", count=3))),
        ("exif_unknown", chunk(b"eXIf", tiff(9))),
    ):
        save(f"{name}.png", png(pixels, 8, chunks))
        save(f"{name}_at_the_end.png", png(pixels, 8, after=chunks))
    packet = 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6).encode()
    for name, *segments in (
        ("exif_after_xmp", packet, (0xE1, b"Exif\0\0" + tiff(3))),
        ("xmp_without_exif_orientation", packet, (0xE1, b"Exif\0\0" + exif(None).tobytes()[6:])),
        ("little_exif", (0xE1, b"Exif\0\0" + tiff(8, big=False))),
        ("two_packets", packet, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(3).encode())),
        ("other_segments", (0xE5, b"whatever"), (0xFE, b"a comment"), packet),
    ):
        save(f"{name}.jpg", jpeg(wide, *segments, quality=90))
    save("grey.jpg", rgb[4].convert("L"))
    save("progressive.jpg", rgb[4], progressive=True)
    save("progressive_turned.jpg", wide, progressive=True, exif=exif(6), quality=90)
    for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
        save(f"colours_{name}.jpg", wide, subsampling=subsampling, quality=90)
    save("restarts.jpg", wide, restart_marker_blocks=3, quality=90)
    save("kept_rgb.jpg", wide, keep_rgb=True, quality=90)
    save("cmyk.jpg", wide.convert("CMYK"), quality=95)
    save("cmyk_unmarked.jpg", jpeg(wide.convert("CMYK"), without=0xEE, quality=95))
    save("two_photos.jpg", jpeg(wide, quality=90) + jpeg(rgb[0], quality=90))
    save("trailing.jpg", jpeg(wide, quality=90) + b"trailing bytes" * 20)
    for name, tail in (
        ("zeros", bytes(100)),
        ("text", b"trailing bytes"),
        ("length", b"\xff" * 12),
        ("png", png(rgba, 8)),
    ):
        save(f"trailing_{name}.png", png(pixels, 8) + tail)
    for size in ((1, 1), (1, 40), (40, 1), (2, 3)):
        for mode, ending in (("RGB", "png"), ("LA", "png"), ("P", "png"), ("RGB", "jpg")):
            save(f"{mode}_{size[0]}x{size[1]}.{ending}", wide.resize(size).convert(mode))
    return paths
