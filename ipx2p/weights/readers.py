"""Find a SOURCE of weights: a single file, a weights folder, or a hub id (layer 2)."""

import os
import re
from pathlib import Path

from ipx2p.errors import InputError

URL = re.compile(r"(https?:|www\.|huggingface\.co(/|$)|hf\.co(/|$))", re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SINGLE_FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
NETWORKS = ("unet", "vae", "text_encoder")
EDIT_SETTINGS = "edit_settings.json"  # how a folder is used; other programs ignore it
NOTES = [
    *("model_index.json", EDIT_SETTINGS),
    *(f"{part}/*.json" for part in (*NETWORKS, "tokenizer", "scheduler", "wrapping")),
    "tokenizer/*.txt",
    *("config.json", "diffusion_pytorch_model.safetensors"),  # of an autoencoder alone
    "wrapping/*.safetensors",
]
TOKENIZER_FILES = [f"{place}*.{kind}" for place in ("", "tokenizer/") for kind in ("json", "txt")]
# Copies of the same weights: half precision, for training only, for other programs.
COPIES = ["*.fp16.*", "*.non_ema.*", "*onnx*", "*openvino*", "*flax*"]


def find_source(source: str | Path) -> Path:
    """The file or folder that a SOURCE names; a hub id is downloaded to huggingface_hub's cache.

    Raises: InputError if it is neither local nor on the hub.
    """
    path = Path(os.path.expanduser(source))
    if not (path / "unet").is_dir() and (path / "config.yaml").is_file():
        raise InputError(f"{source} is the folder of a run: name its weights, {path / 'weights'}")
    if path.exists():
        return path
    if URL.match(str(source)):
        raise InputError(
            f"{source} is a web address: give the hub id in it, OWNER/NAME, such as "
            "timbrooks/instruct-pix2pix, or download the checkpoint file and give its path"
        )
    if not HUB_ID.fullmatch(str(source)) or path.suffix in SINGLE_FILES:
        raise InputError(
            f"{source} does not exist: expected a checkpoint file, a weights folder, or a hub id "
            "such as timbrooks/instruct-pix2pix"
        )
    folder = _fetch(str(source), [*NOTES, *(f"{part}/*.safetensors" for part in NETWORKS)])
    old = [part for part in NETWORKS if not any((folder / part).glob("*.safetensors"))]
    return _fetch(str(source), [*NOTES, *(f"{part}/*.bin" for part in old)]) if old else folder


def find_folder(source: str | Path) -> Path:
    """The weights folder that a SOURCE names; anything else is refused with advice."""
    path = find_source(source)
    if path.is_file():
        raise InputError(
            f"{source} is a single file, expected a weights folder: "
            f"run convert_weights.py {source} FOLDER"
        )
    return path


def find_tokenizer(source: str | Path) -> Path:
    """The folder with a tokenizer's files: a folder, a weights folder, or a hub id.

    Raises: InputError if it is neither local nor on the hub.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = _fetch(str(source), TOKENIZER_FILES)
    if not path.is_dir():
        raise InputError(
            f"{source} is not a folder with a tokenizer: name one with --tokenizer, or a weights "
            "folder with --config"
        )
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def _fetch(hub_id: str, files: list[str]) -> Path:
    import huggingface_hub  # slow, and not needed for what is here

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=files, ignore_patterns=COPIES)
        )
    except Exception as error:  # network, hub and cache each raise their own
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(
            f"{hub_id} is neither a local file or folder nor available from the hub: {reason}"
        ) from error
