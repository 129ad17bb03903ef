"""Made-up pairs and weights to measure with: speed does not depend on values (layer 5)."""

from pathlib import Path

import torch
from PIL import Image

from ipx2p.data.manifest import Record
from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.distributed import World
from ipx2p.images import image_from_pixels01
from ipx2p.models.clip import ClipText
from ipx2p.models.text import TextEncoder, load_tokenizer
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.published_fields import CLIP_L
from ipx2p.seeds import generator
from ipx2p.training.learner import fresh_network
from ipx2p.weights.folder import Weights

QUALITY = 90  # of JPEG files
TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny" / "tokenizer"


def write_weights(folder: Path, world: World) -> None:
    """A model in the sizes of Stable Diffusion 1.5 with 8 input channels and random weights, in
    float32: 4.3 GB."""
    vae = fresh_network(lambda: VAE(VAEConfig()), 0, world)
    text = fresh_network(ClipText, 0, world)
    unet = fresh_network(lambda: UNet(UNetConfig()), 0, world)
    tokenizer = load_tokenizer(TOKENIZER)
    Weights(unet, vae, TextEncoder(text, CLIP_L, *tokenizer), ScheduleConfig()).save(folder)


def write_pairs(folder: Path, count: int, side: int) -> Path:
    """Write pairs as JPEG files, and the manifest that lists them."""
    manifest = folder / "pairs.jsonl"
    with manifest.open("w") as file:
        for pair in range(count):
            names = (f"source_{pair}.jpg", f"target_{pair}.jpg")
            for name in names:
                picture = random_picture(side, generator(0, f"benchmark {name}"))
                picture.save(folder / name, quality=QUALITY)
            file.write(Record(*names, "benchmark", [f"edit number {pair}"]).line() + "\n")
    return manifest


def random_picture(side: int, draws: torch.Generator) -> Image.Image:
    """A random picture whose amplitudes fall with frequency like those of photographs (Field 1987),
    a little faster, so that its JPEG file is as large as that of a photograph."""
    noise = torch.randn(2, side, side, generator=draws)
    frequency = torch.fft.fftfreq(side)[:, None].hypot(torch.fft.rfftfreq(side)).clamp(min=1 / side)
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency**1.3)
    grey, tint = fields / fields.std(dim=(1, 2), keepdim=True)
    return image_from_pixels01(0.5 + 0.2 * grey + 0.05 * torch.stack((tint, 0 * tint, -tint)))
