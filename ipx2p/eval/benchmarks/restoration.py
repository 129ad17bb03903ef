"""Published benchmarks of restoration: rain, blur, noise, low light (layer 4).

Protocols are those of swz30/Restormer (Deraining/evaluate_PSNR_SSIM.m, Motion_Deblurring/
evaluate_gopro_hide.m, Denoising/README.md): whole pictures of 8 bits at their own size, the mean
over pictures. Their scripts pair results with targets by place in the sorted listing; here names
decide, which is the same where no file is missing.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ipx2p.data.instructions import bank
from ipx2p.data.published.registry import open_source
from ipx2p.data.published.source import Chunk, Example, Source
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import Protocol, usable
from ipx2p.eval.cases import Case
from ipx2p.files import digest_bytes
from ipx2p.images import save_image

BLOCKS = ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb")
SIDES = ("noisy", "gt")


def read_pairs(
    folder: Path, extracted: Path, *, kinds: tuple[str, ...], parts: tuple[str, ...]
) -> list[Case]:
    """The test pairs of a set of parallel folders, each with the fixed sentence of its task.

    Args:
        kinds: readers of the layouts in which the set is found. parts: how their names of test
            pairs begin.
    Raises: InputError for a folder that is none of these, lacks the part, or misses pictures.
    """
    sources = [open_source(kind, folder) for kind in kinds]
    source = next((one for one in sources if one.fits(folder)), sources[0])
    source.check_root()
    found = _test_pairs(source, tuple(f"{part}/" for part in parts))
    if not found:
        raise InputError(f"{folder} holds no {' or '.join(parts)}, expected {source.layout}")
    return [*map(_case, found)]


def read_sidd(folder: Path, extracted: Path) -> list[Case]:
    """The validation blocks of SIDD: the two .mat files of the set's page, or folders `noisy` and
    `gt` of PNG files, called 0001_01 (picture and block) in both.
    """
    files = [f"{name}.mat" for name in BLOCKS]
    if any((folder / file).is_file() for file in files):
        return [*map(_case, _blocks(folder, extracted))]
    if not all((folder / side).is_dir() for side in SIDES):
        raise InputError(
            f"{folder} holds no validation blocks of SIDD, expected {' and '.join(files)}, or "
            f"folders {' and '.join(SIDES)} of PNG files"
        )
    source = open_source("folders", folder, source=SIDES[0], target=SIDES[1], task="denoise")
    found = _test_pairs(source, ("",))
    return [_case(replace(one, group=one.name.partition("_")[0])) for one in found]


def _test_pairs(source: Source, begins: tuple[str, ...]) -> list[Example]:
    items = (item for chunk in source.chunks() for item in chunk.items)
    mine = tuple(item for item in items if item.name.startswith(begins))
    return usable(source.read(Chunk(mine, "test")))


def _case(pair: Example) -> Case:
    """Results may be named as sources, or as by the set's scripts, in their own folder or not."""
    tail = pair.name.removeprefix("test/")
    name = tail.replace("/", "-")
    stems = dict.fromkeys((tail, name, tail.rpartition("/")[2], pair.source.stem))
    return Case(
        name,
        pair.source,
        bank(pair.task)[0],
        pair.task,
        pair.target,
        group=pair.group,
        results=tuple(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "jpg")),
    )


def _blocks(folder: Path, extracted: Path) -> list[Example]:
    """The blocks of both .mat files as pictures; the blocks of one picture are a group."""
    noisy, clean = (_read_mat(folder / f"{name}.mat", name) for name in BLOCKS)
    if noisy.shape != clean.shape:
        raise InputError(f"{folder}: noisy blocks are {noisy.shape}, clean ones {clean.shape}")
    found = []
    for picture, block in np.ndindex(noisy.shape[:2]):
        sides = []
        for array in (noisy, clean):
            pixels_u8 = np.ascontiguousarray(array[picture, block])
            sides.append(extracted / f"{digest_bytes(pixels_u8.tobytes())}.png")
            if not sides[-1].is_file():
                save_image(Image.fromarray(pixels_u8), sides[-1])
        name = f"{picture + 1:04d}_{block + 1:02d}"  # as Restormer's script calls its results
        found.append(Example(name, *sides, (), "denoise", "val", f"{picture + 1:04d}"))
    return found


def _read_mat(path: Path, name: str) -> np.ndarray:
    """Blocks of 8-bit pictures, (pictures, blocks, height, width, 3)."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(
            f"reading {path} needs scipy: pip install 'ipx2p[benchmarks]', or give folders noisy "
            "and gt of PNG files"
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


_SIZE = (
    "Edits are made at multiples of the autoencoder's and resized to the target (481 x 321 is "
    "edited at 480 x 320): that costs detail, which the vae row shows.",
    "Whole pictures are measured; numbers of centre crops of 256 x 256 are another protocol.",
    "The vae row is about the best that an edit through the autoencoder can be; restorers without "
    "one have no such limit.",
)
_LUMA = (
    "PSNR and SSIM of the luma (BT.601, 16 to 235, rounded to 8 bits), as the rain sets' script "
    "has them: values in RGB are lower."
)
_WINDOW = (
    "MATLAB's ssim of an RGB picture has a window over the three channels too (ssim_3d); the mean "
    "over channels (ssim) is lower: Restormer has 0.961 and 0.950 on GoPro."
)


def _rain(part: str, pictures: int, *notes: str) -> Protocol:
    kinds = ("rain13k", "rain100") if part.startswith("Rain") else ("rain13k",)
    return Protocol(
        part.lower(),
        f"{part}, {pictures} pictures in synthetic rain, on the luma",
        partial(read_pairs, kinds=kinds, parts=(f"test/{part}", part)),
        ("psnr_y", "ssim_y"),
        pictures=pictures,
        native=True,
        notes=(_LUMA, *notes, *_SIZE),
    )


RESTORATION: tuple[Protocol, ...] = (
    _rain("Rain100H", 100),
    _rain(
        "Rain100L",
        100,
        "InstructIR's 36.84 / 0.973 on Rain100L (arXiv:2401.16468) is measured in RGB.",
    ),
    _rain("Test100", 100),
    _rain("Test1200", 1200),
    _rain(
        "Test2800",
        2800,
        "Each of the 200 clean pictures has 14 in rain, which are one sample of the statistics.",
    ),
    Protocol(
        "gopro",
        "GoPro test, 1111 frames of 1280 x 720, in RGB",
        partial(read_pairs, kinds=("gopro",), parts=("test",)),
        ("psnr", "ssim_3d", "ssim"),
        pictures=1111,
        native=True,
        notes=(
            "The blurry input itself has about 25.6 dB (from memory): the diffusion editors in "
            "these rows are worse than the picture as it was; read every row against the identity "
            "row.",
            _WINDOW,
            *_SIZE,
        ),
    ),
    Protocol(
        "sidd",
        "SIDD validation, 1280 blocks of 256 x 256 from 40 pictures, in RGB",
        read_sidd,
        ("psnr", "ssim_3d", "ssim"),
        pictures=1280,
        native=True,
        notes=(
            "InstructDiffusion's table 5 (InstructPix2Pix 15.14, MagicBrush 16.10, "
            "InstructDiffusion 34.26, its autoencoder 36.56, NAFNet 40.30 dB) is measured on "
            "centre crops of 256 x 256, not on these blocks: not to be compared.",
            _WINDOW,
            *_SIZE,
        ),
    ),
    Protocol(
        "lol",
        "LOL eval15, 15 pictures of 600 x 400 in low light, in RGB",
        partial(read_pairs, kinds=("lol",), parts=("eval15",)),
        ("psnr", "ssim"),
        pictures=15,
        native=True,
        notes=(
            "Rows made with the target's mean brightness (KinD, LLFlow, many diffusion models; "
            "Retinexformer then has 27.18 / 0.850) are another protocol: nothing is matched here.",
            "There are only 15 pictures: read the intervals before the means.",
            *_SIZE,
        ),
    ),
)
