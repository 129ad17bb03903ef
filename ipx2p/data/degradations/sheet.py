"""A sheet that shows what the degradations do to photographs (layer 2)."""

from collections.abc import Sequence

from PIL import Image

from ipx2p.data.degradations.tasks import DEGRADATIONS, DegradeConfig, degrade
from ipx2p.images import fit, image_from_pixels01, pixels01_from_image
from ipx2p.seeds import generator
from ipx2p.sheets import contact_sheet

SHEET_TASKS = (*DEGRADATIONS, "deblur+denoise", "enhance+denoise")
SEVERITIES = {"mild": 0.0, "middle": 0.5, "severe": 1.0}


def degradation_sheet(
    photos: Sequence[Image.Image], config: DegradeConfig, *, cell: int = 256, seed: int = 0
) -> Image.Image:
    """One row per task: a photo, then degraded from the mild end of `config` to the severe one.

    The rows take turns with the photos, which are first resized to a long side of `cell` pixels.
    """
    rows = []
    for place, task in enumerate(SHEET_TASKS):
        clean = fit(photos[place % len(photos)], cell, 1)
        row = [clean]
        for severity in SEVERITIES.values():
            draws = generator(seed, f"sheet {task}")
            pixels01 = degrade(pixels01_from_image(clean), task, draws, config.at(severity))
            row.append(image_from_pixels01(pixels01))
        rows.append(row)
    columns = ["clean", *(f"{name} ({value:g})" for name, value in SEVERITIES.items())]
    return contact_sheet(rows, column_labels=columns, row_labels=SHEET_TASKS, cell=cell)
