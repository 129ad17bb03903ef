"""The original single file (LDM, CompVis layout of Stable Diffusion 1.x), both ways (layer 2).

It holds tensors under their original names and nothing else: head counts, norm groups, prediction
type and tokenizer come from a weights folder (`config`), or are those of Stable Diffusion 1.x where
the width of the text states says so.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.errors import InputError
from ipx2p.files import read_json
from ipx2p.models.clip import ClipText
from ipx2p.models.text import PREFIX, TextEncoder, bare, load_tokenizer
from ipx2p.models.unet import UNet, UNetConfig
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.published_fields import CLIP_L
from ipx2p.tensor_files.tensors import check_fit, load_strict, read_tensors, save_tensors
from ipx2p.weights.folder import Weights
from ipx2p.weights.maps import (
    EMA_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    ema_key,
    is_dropped,
    text_table,
    unet_table,
    vae_table,
)
from ipx2p.weights.readers import find_folder, find_tokenizer

CONV_IN = UNET_PREFIX + "input_blocks.0.0.weight"
TEXT_PROJECTION = UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

SD1_TOKENIZER = "openai/clip-vit-large-patch14"

# Prefixes of keys in files that are not Stable Diffusion 1.x models, and what those are.
STRANGERS = {
    "conditioner.embedders.": "is Stable Diffusion XL; of single files only 1.x can be read",
    "cond_stage_model.model.": "is Stable Diffusion 2.x with its OpenCLIP text encoder; 2.x loads "
    "from a weights folder or hub id, not from a single file",
    "model.diffusion_model.joint_blocks.": "is Stable Diffusion 3, another architecture",
    "model.diffusion_model.double_blocks.": "is Flux, another architecture",
    "double_blocks.": "is Flux, another architecture",
    "down_blocks.": "is the U-Net of a weights folder: give the folder that holds unet/",
    "encoder.": "is an autoencoder alone: give it with --vae",
    "first_stage_model.": "is an autoencoder alone: give it with --vae",
    "lora_": "is a LoRA, not a model",
    "control_model.": "is a ControlNet, not an edit model",
}


def load_single_file(
    path: Path,
    *,
    which: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
) -> Weights:
    """Read an original checkpoint into native networks, in the dtypes of the file.

    Args:
        which: "ema" for the averaged weights of the U-Net, "raw" for the others, None for the
            averaged ones where the file has them.
        config: weights folder or hub id that provides what the file lacks.
        tokenizer: folder or hub id with the tokenizer's files, instead of that of `config`.
    Raises: InputError for another kind of file, or with a report of missing, extra and wrong keys.
    """
    tensors = read_tensors(path)
    for beginning, verdict in STRANGERS.items():
        is_model = CONV_IN in tensors and beginning in (VAE_PREFIX, "encoder.", "lora_")
        if not is_model and any(key.startswith(beginning) for key in tensors):
            raise InputError(f"{path} {verdict}")
    if CONV_IN not in tensors:
        raise InputError(f"{path} is not a Stable Diffusion model: it lacks {CONV_IN}")
    for key, num_dims in ((CONV_IN, 4), (TEXT_PROJECTION, 2)):
        if key in tensors and tensors[key].ndim != num_dims:
            shape = tuple(tensors[key].shape)
            raise InputError(f"{path}: {key} has shape {shape}, expected {num_dims} dimensions")
    template = None if config is None else find_folder(config)
    width = tensors[TEXT_PROJECTION].shape[1] if TEXT_PROJECTION in tensors else None
    if template is None and width != CLIP_L["hidden_size"]:
        raise InputError(
            f"{path} expects text states of width {width}, not the {CLIP_L['hidden_size']} of "
            "Stable Diffusion 1.x: name a weights folder of the same model with --config"
        )

    tensors = _normal_form(_choose(tensors, which, path))
    weights = _without_values(template, tokenizer, tensors[CONV_IN].shape[1], path)
    check_fit(original_tensors(weights), tensors, str(path))
    for network, names in _networks(weights):
        native = network.state_dict()
        found = {key: tensors[names[key]].reshape(native[key].shape) for key in native}
        load_strict(network, found, str(path))
    return weights


def save_single_file(weights: Weights, path: Path) -> None:
    """Write one safetensors file under original names; InputError for Stable Diffusion 2.x."""
    if weights.unet.config.use_linear_projection:
        raise InputError(
            "Stable Diffusion 2.x cannot be written as a single file: there its text encoder has "
            "another layout (OpenCLIP); use --to folder"
        )
    save_tensors(original_tensors(weights), path)


def original_tensors(weights: Weights) -> dict[str, Tensor]:
    """All tensors under the names and in the shapes of an original checkpoint."""
    return {
        names[key]: _as_original(key, tensor)
        for network, names in _networks(weights)
        for key, tensor in network.state_dict().items()
    }


def load_vae_file(path: Path, config: VAEConfig) -> VAE:
    """An autoencoder from a single file: of its own, or as part of a model."""
    tensors = {
        key.removeprefix(VAE_PREFIX): tensor
        for key, tensor in _normal_form(read_tensors(path)).items()
        if key.startswith((VAE_PREFIX, "encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }
    if not tensors:
        raise InputError(
            f"{path} holds no autoencoder: expected keys such as encoder.conv_in.weight"
        )
    with torch.device("meta"):
        vae = VAE(config)
    native = vae.state_dict()
    names = vae_table(config, native)
    expected = {names[key]: _as_original(key, tensor) for key, tensor in native.items()}
    check_fit(expected, tensors, str(path))
    found = {key: tensors[names[key]].reshape(native[key].shape) for key in native}
    load_strict(vae, found, str(path))
    return vae.eval()


def _networks(weights: Weights) -> list[tuple[nn.Module, dict[str, str]]]:
    """Each network with its table, native key -> original key."""
    unet, vae, text = weights.unet, weights.vae, weights.text.model
    vae_names = vae_table(vae.config, vae.state_dict())
    return [
        (unet, unet_table(unet.config, unet.state_dict())),
        (vae, {key: VAE_PREFIX + name for key, name in vae_names.items()}),
        (text, text_table(text.state_dict())),
    ]


def _as_original(key: str, tensor: Tensor) -> Tensor:
    """The autoencoder's attention is a linear layer here and a 1x1 convolution there."""
    is_vae_attention = key.startswith(("encoder.", "decoder.")) and ".attentions.0.to_" in key
    return tensor[:, :, None, None] if is_vae_attention and tensor.ndim == 2 else tensor


def _normal_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are left out on purpose, and with variants made alike.

    Some files store the autoencoder's attention as linear layers, or the text encoder without its
    `text_model.`.
    """
    result = {}
    for key, tensor in tensors.items():
        if is_dropped(key):
            continue
        if key.startswith(TEXT_PREFIX):
            key = TEXT_PREFIX + PREFIX + bare(key.removeprefix(TEXT_PREFIX))
        if ".mid.attn_1." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        result[key] = tensor
    return result


def _choose(tensors: Mapping[str, Tensor], which: str | None, path: Path) -> dict[str, Tensor]:
    """The tensors with the averaged or the raw weights of the U-Net, and without the others."""
    raw = [key for key in tensors if key.startswith(UNET_PREFIX)]
    averaged = {key: tensors[ema_key(key)] for key in raw if ema_key(key) in tensors}
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(EMA_PREFIX)}
    if which == "raw" or (which is None and not averaged):
        found = "left out" if averaged else "not in the file"
        print(f"{path}: raw weights of the U-Net; averaged ones are {found}")
        return rest
    if len(averaged) < len(raw):
        raise InputError(
            f"{path} holds averages (EMA) of {len(averaged)} of {len(raw)} U-Net tensors: "
            "use --weights raw"
        )
    print(f"{path}: averaged (EMA) weights of the U-Net; raw ones are left out")
    return rest | averaged


def _tokenizer(template: Path | None, tokenizer: str | None, path: Path) -> Path:
    if tokenizer is not None:
        return find_tokenizer(tokenizer)
    if template is not None:
        return template / "tokenizer"
    try:
        return find_tokenizer(SD1_TOKENIZER)
    except InputError as error:
        raise InputError(
            f"{path} holds no tokenizer: name a folder that does with --tokenizer, or a weights "
            f"folder with --config ({error})"
        ) from error


def _without_values(
    template: Path | None, tokenizer: str | None, in_channels: int, path: Path
) -> Weights:
    """The networks of a single file, on the meta device."""
    if template is None:
        unet_config, vae_config, text_config = UNetConfig(), VAEConfig(), CLIP_L
        schedule = ScheduleConfig()
    else:
        unet_config = UNetConfig.read(template / "unet" / "config.json")
        vae_config = VAEConfig.read(template / "vae" / "config.json")
        text_config = read_json(template / "text_encoder" / "config.json")
        schedule = ScheduleConfig.load(template)
    unet_config.in_channels = in_channels
    unet_config.check(str(path))
    folder = _tokenizer(template, tokenizer, path)
    with torch.device("meta"):
        unet, vae = UNet(unet_config), VAE(vae_config)
        clip = ClipText(text_config, f"{template or path}: the text encoder")
    text = TextEncoder(clip, text_config, *load_tokenizer(folder))
    return Weights(unet.eval(), vae.eval(), text.eval(), schedule)
