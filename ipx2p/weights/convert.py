"""Convert weights: what `convert_weights.py` does (layer 2)."""

import shutil
import tempfile
from copy import copy
from pathlib import Path

import torch

from ipx2p.devices import DTYPES, dtype_name
from ipx2p.errors import InputError
from ipx2p.files import check_writable
from ipx2p.models.unet import LATENT_CHANNELS, UNet
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.models.wrapping import WrappingConfig
from ipx2p.tensor_files.tensors import check_fit, load_strict
from ipx2p.weights.folder import Weights
from ipx2p.weights.readers import find_folder, find_source, find_tokenizer
from ipx2p.weights.single_file import load_single_file, load_vae_file, save_single_file

CONV_IN = "conv_in.weight"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def convert(
    source: str,
    output: Path,
    *,
    to: str = "folder",
    which: str | None = None,
    edit: bool = False,
    add_difference: tuple[str, str] | None = None,
    config: str | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    prediction: str | None = None,
    dtype: str | None = None,
) -> None:
    """Read SOURCE, apply the changes, write OUTPUT. Tensors keep their dtype by default.

    Args:
        source: single file, weights folder or hub id.
        output: a folder or, with `to="ldm"`, a .safetensors file; must not exist yet.
        which: "ema" or "raw" weights of a single file; None takes ema where the file has it.
        edit: widen a 4-channel U-Net to 8.
        add_difference: (edit model, the model it was tuned from): adds what the tuning changed.
        config, tokenizer: what a single file lacks, see `load_single_file`.
        vae: another autoencoder: a folder, hub id or single file. Feature wrapping is then left
            out, as in a single file.
        prediction: "epsilon" or "v", what the U-Net predicts.
        dtype: of all weights.
    Raises: InputError, and nothing is written.
    """
    output = _check_output(output, to)
    if not find_source(source).is_file():
        for option, value in (("--weights", which), ("--config", config)):
            if value is not None:
                raise InputError(
                    f"{option} {value} is for single files, and {source} is a weights folder, "
                    "which holds one set of weights and its own configuration: leave it out"
                )
    weights = _load(source, which=which, config=config, tokenizer=tokenizer)
    if edit:
        weights.unet = widen(weights.unet)
    if add_difference is not None:
        tuned, origin = (_load(s, config=config, tokenizer=tokenizer) for s in add_difference)
        weights.unet = add_unet_difference(weights.unet, tuned.unet, origin.unet)
    if vae is not None:
        weights.vae = load_vae(vae, weights.vae.config)
    if prediction is not None:
        weights.schedule.prediction_type = PREDICTIONS[prediction]
    if weights.wrapping is not None and (vae is not None or to == "ldm"):
        weights.wrapping = None
        settings = weights.edit_settings or {}
        weights.edit_settings = {n: value for n, value in settings.items() if n != "fidelity"}
        print(f"{source}: its feature wrapping is left out, it belongs to its autoencoder's folder")
    if dtype is not None:
        for network in (weights.unet, weights.vae, weights.text, weights.wrapping):
            if network is not None:
                network.to(DTYPES[dtype])
        if weights.wrapping is not None:
            weights.wrapping.config = WrappingConfig.of(weights.vae)  # whose weights are rounded

    if to == "ldm":
        save_single_file(weights, output)
    else:
        _save_folder(weights, output)
    print(
        f"wrote {output}: {weights.unet.config.in_channels} input channels, "
        f"{weights.schedule.prediction_type}, {dtype_name(weights.unet.conv_in.weight.dtype)}"
    )


def widen(unet: UNet) -> UNet:
    """A U-Net that also sees source latents, and ignores them at first (zero weights).

    Every other tensor, the bias of `conv_in` included, is carried over, so that at the start the
    edit model equals the text-to-image model for any source. 8 channels are returned as they are.
    """
    if unet.config.in_channels == 2 * LATENT_CHANNELS:
        return unet
    config = copy(unet.config)
    config.in_channels = 2 * LATENT_CHANNELS
    tensors = unet.state_dict()
    old = tensors[CONV_IN]
    tensors[CONV_IN] = torch.cat([old, torch.zeros_like(old)], dim=1)
    with torch.device("meta"):
        wide = UNet(config)
    load_strict(wide, tensors, "the widened U-Net")
    return wide.train(unet.training)


def add_unet_difference(unet: UNet, tuned: UNet, origin: UNet) -> UNet:
    """unet + (tuned - origin): adds to a model the edits that another one learned.

    All are widened to 8 channels first. Computed in float32, kept in the dtype of `unet`.
    """
    unet, tuned, origin = widen(unet), widen(tuned), widen(origin)
    plus, minus = tuned.state_dict(), origin.state_dict()
    check_fit(unet.state_dict(), plus, "the edit model to add")
    check_fit(unet.state_dict(), minus, "the model it was tuned from")
    with torch.no_grad():
        for key, tensor in unet.state_dict().items():
            tensor.copy_(tensor.float() + plus[key].float() - minus[key].float())
    return unet


def _load(
    source: str,
    *,
    which: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
) -> Weights:
    path = find_source(source)
    if path.is_file():
        return load_single_file(path, which=which, config=config, tokenizer=tokenizer)
    return Weights.load(
        find_folder(source), tokenizer=None if tokenizer is None else find_tokenizer(tokenizer)
    )


def load_vae(source: str, config: VAEConfig) -> VAE:
    """An autoencoder alone, in the dtype of its file.

    Args:
        source: its folder, a weights folder, a hub id of either, or a single file.
        config: sizes, which a single file does not have.
    """
    path = find_source(source)
    if path.is_file():
        return load_vae_file(path, config)
    return VAE.load(path if (path / "config.json").exists() else path / "vae", dtype=None)


def _check_output(output: Path, to: str) -> Path:
    """The resolved path, if a new file or folder can be written there."""
    if to == "ldm" and output.suffix != ".safetensors":
        raise InputError(f"{output} does not end in .safetensors, which --to ldm writes")
    place = output.resolve()
    if place.exists() and (to == "ldm" or not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{output} exists already: remove it, or choose another place")
    check_writable(place.parent)
    return place


def _save_folder(weights: Weights, output: Path) -> None:
    """Write beside `output` and rename, so that half a folder never looks like a whole one."""
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=".convert."))
    try:
        weights.save(temporary)
        temporary.chmod(0o755)
        temporary.replace(output)  # takes the place of an empty folder too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
