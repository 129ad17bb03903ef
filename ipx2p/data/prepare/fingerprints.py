"""Fingerprints that find near copies among many pictures (layer 2).

A difference hash records which of two neighbouring patches is brighter, so it survives resizing,
compression and mild changes of brightness; a thumbnail tells flat pictures of two colours apart.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

BITS = 128
BANDS = 8  # hashes that differ in fewer bits than there are bands agree in a whole band
MAX_BITS = BANDS - 1  # so many bits may differ between copies of a picture
MAX_SHADE = 12  # and so much, on average, the values 0..255 of their thumbnails
SIDE = 8


def fingerprint(image: Image.Image) -> str:
    """A picture of any size as hexadecimal: 128 bits of differences, then 4 x 4 RGB colours."""
    grey = image.convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    right = values[:SIDE, 1:] > values[:SIDE, :-1]
    below = values[1:, :SIDE] > values[:-1, :SIDE]
    bits = np.packbits(np.concatenate([right.ravel(), below.ravel()]))
    colours = image.convert("RGB").resize((4, 4), Image.Resampling.BOX)
    return bits.tobytes().hex() + colours.tobytes().hex()


def near_copies(fingerprints: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places (earlier, later) of near copies.

    Every copy is paired with at least one earlier one, not with all of them.
    """
    if not fingerprints:
        return
    data = np.frombuffer(bytes.fromhex("".join(fingerprints)), dtype=np.uint8)
    data = data.reshape(len(fingerprints), -1)
    bits, colours = data[:, : BITS // 8], data[:, BITS // 8 :].astype(np.int16)
    bands = bits.reshape(len(bits), BANDS, -1)
    first: dict[bytes, int] = {}  # the first of those that are equal to the bit
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place, row in enumerate(data):
        if (earlier := first.setdefault(row.tobytes(), place)) != place:
            yield earlier, place
            continue
        keys = [(band, part.tobytes()) for band, part in enumerate(bands[place])]
        others = np.array(sorted({other for key in keys for other in buckets[key]}), dtype=int)
        if len(others):
            distance = np.unpackbits(bits[others] ^ bits[place], axis=1).sum(axis=1)
            shade = np.abs(colours[others] - colours[place]).mean(axis=1)
            for other in others[(distance <= MAX_BITS) & (shade <= MAX_SHADE)]:
                yield int(other), place
        for key in keys:
            buckets[key].append(place)
