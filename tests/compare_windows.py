"""Compare ways to edit a picture that is larger than the model's size, with edits really made.

    python -m tests.compare_windows assets/tiny PHOTO...

Photographs are reduced to a long side of `--size` pixels, cut to whole windows, and degraded at
that size. Then they are edited as a whole, in windows, in tiles of the same size that know nothing
of one another, and by a small copy with `full_size`. Besides PSNR, the seams: the energy of the
error's differences between neighbouring pixels, where tiles end or windows start, over elsewhere.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch

from ipx2p import seeds
from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.editing.editor import Editor
from ipx2p.images import fit, image_from_pixels01, load_image, pixels01_from_image, save_image
from ipx2p.metrics import psnr
from ipx2p.sheets import contact_sheet
from tests.compare_full_size import INSTRUCTIONS

TASKS = ("denoise", "derain", "deblur", "enhance")
WAYS = ("source", "whole", "windows", "tiles", "full size")


def edited(editor: Editor, source01: torch.Tensor, way: str, instruction: str) -> torch.Tensor:
    """The edit of a picture, (3, H, W) in [0, 1]."""
    if way == "source":
        return source01
    side, seed = editor.resolution, 0
    if way == "tiles":
        rows = source01.split(side, dim=1)
        tiles = [image_from_pixels01(tile) for row in rows for tile in row.split(side, dim=2)]
        made = editor.edit(tiles, instruction, seeds=range(len(tiles)), resolution=None).pixels01
        across = source01.shape[2] // side
        made = [torch.cat(made[i : i + across], dim=2) for i in range(0, len(made), across)]
        return torch.cat(made, dim=1)
    how = {"whole": {"resolution": None}, "windows": {"resolution": None, "window": side}}
    source = image_from_pixels01(source01)
    result = editor.edit(source, instruction, seeds=seed, **how.get(way, {"full_size": True}))
    return result.pixels01[0]


def seams(error: torch.Tensor, every: int) -> float:
    """Energy of an error's differences at borders, one in `every` pixels, over elsewhere."""
    at, elsewhere = [], []
    for differences in (error.diff(dim=-1), error.mT.diff(dim=-1)):
        border = (torch.arange(differences.shape[-1]) + 1) % every == 0
        at.append(differences[..., border].square().flatten())
        elsewhere.append(differences[..., ~border].square().flatten())
    return float(torch.cat(at).mean() / torch.cat(elsewhere).mean())


def main() -> None:
    """Measure, print means over the photographs, and write a sheet of each task."""
    parser = argparse.ArgumentParser(description="Compare ways to edit a large picture.")
    parser.add_argument("weights")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--size", type=int, default=384, help="long side (default: 384)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--output", type=Path, help="folder for sheets")
    args = parser.parse_args()
    editor = Editor.load(args.weights)
    side, found, sheets = editor.resolution, defaultdict(list), defaultdict(list)
    for seed, path in enumerate(args.photos):
        clean = pixels01_from_image(fit(load_image(path), args.size, 8))
        height, width = (length // side * side for length in clean.shape[1:])
        clean = clean[:, :height, :width]
        for task in args.tasks:
            draws = seeds.generator(seed, "compare windows", task)
            source = degrade(clean, task, draws, DegradeConfig())
            row = []
            for way in WAYS:
                started_at = time.perf_counter()
                result = edited(editor, source, way, INSTRUCTIONS[task])
                found[task, way, "seconds"].append(time.perf_counter() - started_at)
                found[task, way, "psnr"].append(float(psnr(result[None], clean[None])))
                for name, every in (("at tiles", side), ("at windows", side // 2)):
                    found[task, way, name].append(seams(result - clean, every))
                row.append(image_from_pixels01(result))
            sheets[task].append([*row, image_from_pixels01(clean)])
    for name in ("psnr", "at tiles", "at windows", "seconds"):
        print(f"\n{name:12}", *(f"{way:>10}" for way in WAYS))
        for task in args.tasks:
            means = [torch.tensor(found[task, way, name]).mean().item() for way in WAYS]
            print(f"{task:12}", *(f"{mean:10.2f}" for mean in means))
    labels = [*WAYS, "target"]
    for task, rows in sheets.items() if args.output else ():
        save_image(
            contact_sheet(rows, column_labels=labels, row_labels=[""] * len(rows), cell=args.size),
            args.output / f"{task}.png",
        )


if __name__ == "__main__":
    main()
