"""Finished folders of records whose edits are filters, in place of models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

from ipx2p.editing.settings import EditSettings
from ipx2p.eval.models import recorded
from ipx2p.eval.records import Record, Records, key_of
from ipx2p.files import digest_file
from ipx2p.images import fit, load_image, pixels01_from_image, save_image
from ipx2p.metrics import l1, psnr, ssim
from tests.conftest import ROOT

Filter = Callable[[Image.Image], Image.Image]
PHOTOS = ROOT / "assets" / "photos"
TASKS = {"deblur": "sharpen the blurred photo", "brighten": "lift the shadows of this photo"}
MADE_WITH = {"weights": "weights/mine", "weights_digest": "abc123", "dtype": "float32"}
ON = {"device": "cpu", "device_name": "Tiny CPU", "threads": 1, "dtype": "float32", "batch_size": 2}
ON |= {"batch_branches": True, "compiled": False, "ipx2p": "0.1", "torch": "2.9", "python": "3.11"}


def spoil(task: str, image: Image.Image) -> Image.Image:
    """The source that the task is to repair."""
    if task == "deblur":
        return image.filter(ImageFilter.GaussianBlur(image.width / 256))
    return ImageEnhance.Brightness(image).enhance(0.4)


def sharpened(amount: float) -> Filter:
    return lambda image: image.filter(ImageFilter.UnsharpMask(image.width / 200, int(amount), 0))


def brightened(factor: float) -> Filter:
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


def settings_of(
    guidance: str = "ip2p", scale: float = 7.0, image_scale: float = 1.5, **more: Any
) -> dict[str, Any]:
    """As records have them."""
    settings = {"sampler": "euler", "guidance_scale": scale, "image_guidance_scale": image_scale}
    return recorded(EditSettings(**settings | {"guidance": guidance} | more))


def write_folder(
    folder: Path,
    edits: Sequence[tuple[str, dict[str, Any] | None, Filter | None]],
    *,
    photos: Sequence[str] = ("cat", "bee"),
    tasks: Sequence[str] = ("deblur", "brighten"),
    seeds: Sequence[int] = (0,),
    side: int = 48,
    benchmark: str = "",
) -> list[Record]:
    """Records of every photo and task: identity, oracle, and the (model, settings, filter) given.

    Without a filter the edit is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder)
    for photo in photos:
        target = fit(load_image(PHOTOS / f"{photo}.jpg"), side, 8)
        for task in tasks:
            source = spoil(task, target)
            case = {"name": f"{photo}-{task}", "group": photo, "task": task}
            case |= {"instruction": TASKS[task], "benchmark": benchmark}
            case |= {"source": f"/gone/{photo}.png", "target": f"/gone/{photo}-target.png"}
            built_in = [("identity", None, lambda x: x), ("oracle", None, lambda _, t=target: t)]
            for model, settings, edit in [*built_in, *edits]:
                for seed in [None] if settings is None else seeds:
                    image = edit and edit(source)
                    records.add(_record(folder, case, model, settings, seed, image, source, target))
    return [*records.by_key.values()]


def _record(folder, case, model, settings, seed, image, source, target) -> Record:
    key = key_of([case, model, settings, seed, source.size])
    picture, scores = None, {}
    if image is not None:
        path = folder / "edits" / f"{key}.png"
        save_image(image, path)
        picture = {"file": f"edits/{key}.png", "digest": digest_file(path)}
        picture |= {"width": image.width, "height": image.height}
        a, b, c = (pixels01_from_image(one)[None] for one in (image, source, target))
        scores = {"change": 100 * l1(a, b), "psnr": psnr(a, c), "ssim": ssim(a, c)}
        scores = {name: value.item() for name, value in scores.items()}
    made_with = MADE_WITH | {"resolution": max(source.size)} if settings else {}
    cost = {"evaluations": 60, "seconds": 1.5, "computed_on": ON} if settings else {}
    return Record(key, key, case, model, settings, seed, made_with, picture, scores=scores, **cost)
