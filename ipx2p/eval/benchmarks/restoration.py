"""Published benchmarks of restoration: rain, blur, noise, low light (layer 4).

Protocols are those of swz30/Restormer (Deraining/evaluate_PSNR_SSIM.m, Motion_Deblurring/
evaluate_gopro_hide.m, Denoising/README.md): whole pictures of 8 bits at their own size, the mean
over pictures. Their scripts pair results with targets by place in the sorted listing; here names
decide, which is the same where no file is missing.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ipx2p.data.instructions import bank
from ipx2p.data.published.registry import open_source
from ipx2p.data.published.source import Chunk, Example, Source
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.edit_sets import usable
from ipx2p.eval.benchmarks.protocol import Protocol
from ipx2p.eval.cases import Case
from ipx2p.files import digest_bytes
from ipx2p.images import save_image

BLOCKS = ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb")
SIDES = ("noisy", "gt")
PER_PICTURE = 32  # blocks of SIDD
# Names of blocks as Restormer's script writes them (picture and block, from 1), and as MMagic's.
BLOCK_NAMES = re.compile(r"(?P<picture>\d+)_\d+|val_(?P<block>\d+)_NOISY")


def read_pairs(
    folder: Path, extracted: Path, *, kinds: tuple[str, ...], parts: tuple[str, ...], published: int
) -> list[Case]:
    """The test pairs of a set of parallel folders, each with the fixed sentence of its task.

    Args:
        kinds: readers of the layouts in which the set is found. parts: how their names of test
            pairs begin. published: how many there are.
    Raises: InputError for a folder that is none of these, lacks the part, or misses pictures.
    """
    sources = [open_source(kind, folder) for kind in kinds]
    source = next((one for one in sources if one.fits(folder)), sources[0])
    source.check_root()
    found = usable(_test_pairs(source, parts))
    if not found:
        raise InputError(f"{folder} holds no {' or '.join(parts)}, expected {source.layout}")
    return _cases(found, published, folder)


def read_sidd(folder: Path, extracted: Path, *, published: int) -> list[Case]:
    """The validation blocks of SIDD: the two .mat files of the set's page, or folders `noisy` and
    `gt` of PNG files, called 0001_01 (picture and block) in both, or val_0_NOISY and val_0_GT.
    """
    files = [f"{name}.mat" for name in BLOCKS]
    if any((folder / file).is_file() for file in files):
        return _cases(_blocks(folder, extracted), published, folder)
    if not all((folder / side).is_dir() for side in SIDES):
        raise InputError(
            f"{folder} holds no validation blocks of SIDD, expected {' and '.join(files)}, or "
            f"folders {' and '.join(SIDES)} of PNG files"
        )
    by_mmagic = any((folder / SIDES[0]).glob("val_*"))
    options = {"source": SIDES[0], "target": SIDES[1], "task": "denoise"}
    pairs = "val_{}_NOISY=val_{}_GT" if by_mmagic else "{}"
    source = open_source("folders", folder, **options, pairs=pairs)
    found = [replace(one, group=_picture(one.name)) for one in usable(_test_pairs(source, ("",)))]
    return _cases(found, published, folder)


def _picture(name: str) -> str:
    """The picture of a block, "" if its name does not say."""
    match = BLOCK_NAMES.fullmatch(name)
    if match is None:
        return ""
    return match["picture"] or f"{int(match['block']) // PER_PICTURE + 1:04d}"


def _test_pairs(source: Source, parts: tuple[str, ...]) -> Iterable[Example]:
    begins = tuple(f"{part}/" if part else "" for part in parts)
    items = (item for chunk in source.chunks() for item in chunk.items)
    yield from source.read(Chunk(tuple(x for x in items if x.name.startswith(begins)), "test"))


def _cases(found: list[Example], published: int, folder: Path) -> list[Case]:
    if len(found) != published:
        warnings.warn(
            f"{folder} has {len(found)} pairs, the published rows are means over {published}",
            stacklevel=2,
        )
    return [
        Case(
            example.name.removeprefix("test/").replace("/", "-"),
            example.source,
            bank(example.task)[0],
            example.task,
            example.target,
            group=example.group,
            results=_results(example),
        )
        for example in found
    ]


def _results(example: Example) -> tuple[str, ...]:
    """Names as the source's, as the set's scripts write them, in its own folder or beside all."""
    tail = example.name.removeprefix("test/")
    stems = (tail, tail.replace("/", "-"), tail.rpartition("/")[2], example.source.stem)
    return tuple(f"{stem}.{suffix}" for stem in dict.fromkeys(stems) for suffix in ("png", "jpg"))


def _blocks(folder: Path, extracted: Path) -> list[Example]:
    """The blocks of both .mat files as pictures; the blocks of one picture are a group."""
    noisy, clean = (_read_mat(folder / f"{name}.mat", name) for name in BLOCKS)
    if noisy.shape != clean.shape:
        raise InputError(f"{folder}: noisy blocks are {noisy.shape}, clean ones {clean.shape}")
    found = []
    for picture, block in np.ndindex(noisy.shape[:2]):
        sides = (_extract(array[picture, block], extracted) for array in (noisy, clean))
        name = f"{picture + 1:04d}_{block + 1:02d}"  # as Restormer's script calls its results
        found.append(Example(name, *sides, (), "denoise", "val", f"{picture + 1:04d}"))
    return found


def _read_mat(path: Path, name: str) -> np.ndarray:
    """Blocks of 8-bit pictures, (pictures, blocks, height, width, 3)."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(
            f"{path} is a MATLAB file: pip install scipy, or give folders noisy and gt of PNG files"
        ) from error
    if not path.is_file():
        raise InputError(f"{path} is missing: it is on SIDD's page beside the other blocks")
    try:
        blocks = loadmat(path)[name]
    except Exception as error:  # of many kinds, by what is damaged
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or holds no {name} ({reason}): fetch it") from error
    if blocks.dtype != np.uint8 or blocks.ndim != 5 or blocks.shape[-1] != 3:
        found = f"{blocks.dtype} {blocks.shape}"
        raise InputError(f"{path}: {name} is {found}, expected uint8 (40, 32, 256, 256, 3)")
    return blocks


def _extract(block: np.ndarray, folder: Path) -> Path:
    """A block as a file that is named by its content and written once."""
    block = np.ascontiguousarray(block)
    path = folder / f"{digest_bytes(block.tobytes())}.png"
    if not path.is_file():
        save_image(Image.fromarray(block), path)
    return path


_SIZE = (
    "Edits are made at multiples of the autoencoder's and resized to the target (481 x 321 is "
    "edited at 480 x 320): that costs detail, which the vae row shows.",
    "Whole pictures are measured; numbers of centre crops of 256 x 256 are another protocol.",
    "The vae row is about the best that an edit through the autoencoder can be; restorers without "
    "one have no such limit.",
)
_LUMA = (
    "PSNR and SSIM of the luma (BT.601, 16 to 235, rounded to 8 bits), as the rain sets' script "
    "has them: values in RGB are lower.",
)
_WINDOW = (
    "MATLAB's ssim of an RGB picture has a window over the three channels too (ssim_3d); the mean "
    "over channels (ssim) is lower: Restormer has 0.961 and 0.950 on GoPro.",
)


def _rain(part: str, pictures: int, *notes: str) -> Protocol:
    kinds = ("rain13k", "rain100") if part.startswith("Rain") else ("rain13k",)
    return Protocol(
        part.lower(),
        f"{part}, {pictures} pictures in synthetic rain, on the luma",
        partial(read_pairs, kinds=kinds, parts=(f"test/{part}", part), published=pictures),
        ("psnr_y", "ssim_y"),
        native=True,
        notes=(*_LUMA, *notes, *_SIZE),
    )


RESTORATION: tuple[Protocol, ...] = (
    _rain("Rain100H", 100),
    _rain(
        *("Rain100L", 100),
        "InstructIR's 36.84 / 0.973 on Rain100L (arXiv:2401.16468) is measured in RGB.",
    ),
    _rain("Test100", 100),
    _rain("Test1200", 1200),
    _rain(
        *("Test2800", 2800),
        "Each of the 200 clean pictures has 14 in rain, which are one sample of the statistics.",
    ),
    Protocol(
        "gopro",
        "GoPro test, 1111 frames of 1280 x 720, in RGB",
        partial(read_pairs, kinds=("gopro",), parts=("test",), published=1111),
        ("psnr", "ssim_3d", "ssim"),
        native=True,
        notes=(
            "The blurry input itself has about 25.6 dB (from memory): the diffusion editors in "
            "these rows are worse than the picture as it was; read every row against the identity "
            "row.",
            *(*_WINDOW, *_SIZE),
        ),
    ),
    Protocol(
        "sidd",
        "SIDD validation, 1280 blocks of 256 x 256 from 40 pictures, in RGB",
        partial(read_sidd, published=1280),
        ("psnr", "ssim_3d", "ssim"),
        native=True,
        notes=(
            "InstructDiffusion's table 5 (InstructPix2Pix 15.14, MagicBrush 16.10, "
            "InstructDiffusion 34.26, its autoencoder 36.56, NAFNet 40.30 dB) is measured on "
            "centre crops of 256 x 256, not on these blocks: not to be compared.",
            *(*_WINDOW, *_SIZE),
        ),
    ),
    Protocol(
        "lol",
        "LOL eval15, 15 pictures of 600 x 400 in low light, in RGB",
        partial(read_pairs, kinds=("lol",), parts=("eval15",), published=15),
        ("psnr", "ssim"),
        native=True,
        notes=(
            "Rows made with the target's mean brightness (KinD, LLFlow, many diffusion models; "
            "Retinexformer then has 27.18 / 0.850) are another protocol: nothing is matched here.",
            "There are only 15 pictures: read the intervals before the means.",
            *_SIZE,
        ),
    ),
)
