"""Tiny networks of random weights, saved as the real ones are."""

from pathlib import Path

import torch
import torchvision
from torch import nn

from tests.conftest import GOLDEN

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """A CLIP model with the golden tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(GOLDEN / "diffusers" / "tokenizer")
    size = SIZE | {"num_hidden_layers": 1}
    text = size | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = size | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A vision transformer of three layers."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SIZE, num_hidden_layers=3, image_size=32, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folder


def save_backbone(path: Path, name: str) -> Path:
    """The layers of one of torchvision's networks, with their names there."""
    with torch.device("meta"):
        features = getattr(torchvision.models, name)(weights=None).features
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, like in features.state_dict().items():
        fan_in = like[0].numel() if like.ndim > 1 else 100
        tensors[f"features.{key}"] = torch.randn(like.shape, generator=generator) / fan_in**0.5
    torch.save(tensors | {"classifier.1.bias": torch.zeros(4)}, path)
    return path
