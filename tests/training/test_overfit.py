"""Eight pairs are learned by heart: the check that the whole path from pictures to edits is right.

Objective, conditions, cache, sampler and autoencoder must all agree for that to happen.
"""

import json

import pytest
import torch
import yaml

from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.data.listing import find_photos
from ipx2p.data.pairs import centre_geometry
from ipx2p.images import image_from_pixels01, load_image
from ipx2p.training.config import TrainConfig
from ipx2p.training.loop import train
from ipx2p.training.run import Run
from tests.conftest import ROOT

SIDE = 32


@pytest.mark.slow
def test_eight_pairs_are_learned_to_within_2_db_of_the_ceiling(tmp_path):
    lines = []
    for number, path in enumerate(find_photos(ROOT / "assets" / "photos")[:8]):
        photo = load_image(path)
        target = centre_geometry(photo.size, SIDE).apply(photo)
        draws = torch.Generator().manual_seed(number)
        pair = {"source": degrade(target, "enhance", draws, DegradeConfig()), "target": target}
        for name, pixels01 in pair.items():
            image_from_pixels01(pixels01).save(tmp_path / f"{name}_{number}.png")
        names = {name: f"{name}_{number}.png" for name in pair}
        lines.append(json.dumps(names | {"instruction": "enhance the image", "task": "enhance"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    settings["run"] = {"name": "overfit", "dir": str(tmp_path)}
    settings["model"]["weights"] = str(ROOT / "assets" / "tiny")
    settings["data"] = {
        "manifest": str(tmp_path / "pairs.jsonl"),
        "validation_manifest": str(tmp_path / "pairs.jsonl"),
        "cache": True,
        "cache_dir": str(tmp_path / "cache"),
        "resolution": SIDE,
        "max_zoom": 1.0,
        "flip": False,
        "workers": 0,
    }
    settings["optimizer"]["learning_rate"] = 2e-3
    settings["train"] |= {"batch_size": 8, "steps": 1000, "checkpoint_every": 1000}
    settings["validation"] |= {"pairs_per_task": 8, "resolution": SIDE}
    (tmp_path / "overfit.yaml").write_text(yaml.safe_dump(settings))
    config = TrainConfig.load(tmp_path / "overfit.yaml", ["evaluation=null"])
    train(config)
    [score] = Run(config).final_scores()
    assert score["pairs"] == 8 and score["psnr_input"] < 12
    assert score["psnr_edit"] > score["psnr_ceiling"] - 2
