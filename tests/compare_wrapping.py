"""PSNR by the weight of feature wrapping, on the held-out pairs of the run that trained it.

    python tests/compare_wrapping.py runs/tiny_cfw

Two things are decoded with the features of the source: latents of the target, so that only the
autoencoder's own loss can be made good; and edits, as the weights say how.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ipx2p.config import load_config
from ipx2p.data.pairs import EditPair
from ipx2p.editing.decoding import decode
from ipx2p.editing.editor import Editor
from ipx2p.images import image_from_pixels01, pixels01_from_pixels, pixels_from_pixels01
from ipx2p.metrics import psnr
from ipx2p.training.config import TrainConfig
from ipx2p.training.samples import open_pairs
from ipx2p.training.validation import fixed_pairs

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def held_out(config: TrainConfig) -> list[EditPair]:
    """The pairs that the run was validated with."""
    _, pairs = open_pairs(config.data)
    per_task, seed = config.validation.pairs_per_task, config.run.seed
    return fixed_pairs(pairs, per_task=per_task, resolution=config.edit_resolution, seed=seed)


@torch.no_grad()
def of_target(editor: Editor, pair: EditPair, seed: int) -> Tensor:
    """Scaled latents of the target, (1, 4, h, w)."""
    pixels = pixels_from_pixels01(pair.target_pixels01)[None]
    return editor.vae.scale(editor.vae.encode(pixels.to(editor.device)).mode())


def of_edit(editor: Editor, pair: EditPair, seed: int) -> Tensor:
    """Latents of the edit, likewise."""
    source = image_from_pixels01(pair.source_pixels01)
    result = editor.edit(source, pair.instruction, seeds=seed)
    return result.latents[0][None].to(editor.device)


def by_weight(
    editor: Editor, pairs: Sequence[EditPair], latents_of: Callable[[Editor, EditPair, int], Tensor]
) -> dict[str, list[float]]:
    """Mean PSNR in dB for each of `WEIGHTS`, by task."""
    scores = defaultdict(list)
    for seed, pair in enumerate(pairs):  # as in the validation of a run with seed 0
        latents = latents_of(editor, pair, seed)
        source: Image.Image = image_from_pixels01(pair.source_pixels01)
        row = [
            pixels01_from_pixels(decode(editor.vae, latents, source, editor.wrapping, weight))
            for weight in WEIGHTS
        ]
        target = pair.target_pixels01.expand(len(WEIGHTS), -1, -1, -1)
        scores[pair.task].append(psnr(torch.stack(row), target))
    return {task: torch.stack(rows).mean(0).tolist() for task, rows in scores.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="PSNR by the weight of feature wrapping.")
    parser.add_argument("run", type=Path, help="folder of a run with objective.kind=wrapping")
    run = parser.parse_args().run
    config = load_config(TrainConfig, run / "config.yaml")
    editor, pairs = Editor.load(run / "weights", device=config.train.device), held_out(config)
    for title, latents_of in (("latents of the target", of_target), ("edits", of_edit)):
        print(f"{title:24}", *(f"w {weight:<6}" for weight in WEIGHTS))
        for task, values in by_weight(editor, pairs, latents_of).items():
            print(f"{task:24}", *(f"{value:<8.2f}" for value in values))


if __name__ == "__main__":
    main()
