"""Collect the photographs that the base model of `assets/tiny` learns from.

    python assets/recipes/photos.py PACKAGES OUTPUT

`photos.txt` lists them: file name, package, path in the package. PACKAGES is a folder of Debian
packages, unpacked into folders of their names:

    for p in gcompris-qt-data libjxl-testdata lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \\
             mate-backgrounds palapeli-data plasma-workspace-wallpapers; do
        apt-get download $p && dpkg-deb -x ${p}_*.deb PACKAGES/$p
    done

Those of scikit-image are read from the installed Python package. The photographs that examples and
documentation hold out are copied from `assets/photos`. Nothing is redistributed here.
"""

import argparse
import io
import shutil
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps

HERE = Path(__file__).parent
HELD_OUT = ("castle.jpg", "coffee.jpg", "kingfisher.jpg", "tulips.jpg")  # of assets/photos
SHORT_SIDE = 640  # pixels; larger photographs are reduced
RESOURCES = "usr/share/gcompris-qt/rcc"


def resource_files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The uncompressed files of a Qt resource file, by their path.

    A tree of nodes (offset of the name, flags, then children or data), big endian; see `rcc` in the
    documentation of Qt.
    """
    magic, version, tree, data, names = struct.unpack(">4sIIII", content[:20])
    assert magic == b"qres"
    size_of_node = 14 if version < 2 else 22

    def walk(index: int, above: str) -> Iterator[tuple[str, bytes]]:
        node = tree + index * size_of_node
        name_at, flags = struct.unpack(">IH", content[node : node + 6])
        name_at += names
        (length,) = struct.unpack(">H", content[name_at : name_at + 2])
        name = content[name_at + 6 : name_at + 6 + 2 * length].decode("utf-16-be")
        path = f"{above}/{name}"
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", content[node + 6 : node + 14])
            for child in range(first, first + count):
                yield from walk(child, path)
        elif not flags & 5:  # neither zlib nor zstd
            (start,) = struct.unpack(">I", content[node + 10 : node + 14])
            start += data
            (length,) = struct.unpack(">I", content[start : start + 4])
            yield path, content[start + 4 : start + 4 + length]

    yield from walk(0, "")


def gcompris_pictures(packages: Path) -> dict[str, bytes]:
    """The pictures of all activities: `ACTIVITY__FOLDER_FILE` -> content."""
    found = {}
    for rcc in sorted((packages / "gcompris-qt-data" / RESOURCES).glob("*.rcc")):
        for path, content in resource_files(rcc.read_bytes()):
            if path.endswith(".webp"):
                found[f"{rcc.stem}__{path.split('/resource/')[-1].replace('/', '_')}"] = content
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    gcompris = gcompris_pictures(arguments.packages)
    site_packages = Path(find_spec("skimage").origin).parents[1]
    for line in (HERE / "photos.txt").read_text().splitlines():
        name, package, path = line.split(" ")
        if package == "gcompris-qt-data":
            file = io.BytesIO(gcompris[path])
        else:
            folder = site_packages if package == "scikit-image" else arguments.packages / package
            file = folder / path
        image = Image.open(file)
        image.draft("RGB", (1400, 1400))  # JPEG: decoded at a fraction of the size
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        if scale < 1:
            size = [round(side * scale) for side in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS)
        image.save(arguments.output / name, quality=95)
    for name in HELD_OUT:
        shutil.copy(HERE.parent / "photos" / name, arguments.output / name)


if __name__ == "__main__":
    main()
