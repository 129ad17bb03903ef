"""Rows that need no edit model: what every edit must beat, and what none can (layer 4)."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, Sizes
from ipx2p.eval.classical import CLASSICAL, denoise
from ipx2p.eval.models import Model, Trial
from ipx2p.eval.records import CLASSICAL_ROW, IDENTITY, ORACLE, VAE_ROW, key_of
from ipx2p.files import digest_file, hasher
from ipx2p.images import (
    image_from_pixels01,
    image_size,
    load_image,
    pixels01_from_image,
    pixels01_from_pixels,
    pixels_from_pixels01,
    resize,
)
from ipx2p.models.vae import VAE

ROUNDED = 1.6  # how far the shape of an edit may differ, since sides are rounded
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def built_in_trials(cases: Sequence[Case], vaes: Mapping[str, Model], sizes: Sizes) -> list[Trial]:
    """Identity for every case; target, autoencoders and classical method where they can be.

    Args:
        vaes: see `autoencoders`.
    """
    resizing, restoring = (digest_file(inspect.getsourcefile(one)) for one in (resize, denoise))
    trials = []
    for case in cases:
        size = sizes.of_scores(case)
        rows: list[tuple[str, list, dict]] = [(IDENTITY, [case.digest, size], {})]
        if case.target is not None:
            rows.append((ORACLE, [case.target_digest, size], {}))
            for digest, model in vaes.items():
                content = [case.target_digest, sizes.of_edit(case), digest]
                made_with = {"weights": model.source, "weights_digest": digest}
                rows.append((VAE_ROW, content, made_with))
        if case.task in CLASSICAL:
            rows.append((CLASSICAL_ROW, [case.digest, size, case.task, restoring], {}))
        for name, content, made_with in rows:
            trials.append(
                Trial(case, name, None, None, key_of([name, content, resizing]), made_with)
            )
    return trials


def autoencoders(models: Sequence[Model]) -> dict[str, Model]:
    """The first model with each of the different autoencoders, by a digest of its weights.

    They are compared as they are used, in float32: a copy in a trained folder is the same one.
    """
    different: dict[str, Model] = {}
    for model in models:
        if model.has_weights:
            vae = VAE.load(model.folder / "vae")
            digest = hasher(12)
            digest.update(repr(vae.config).encode())
            for name, tensor in sorted(vae.state_dict().items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
            different.setdefault(digest.hexdigest(), model)
    return different


def make_built_in(
    vaes: Mapping[str, Model], sizes: Sizes, device: torch.device
) -> Callable[[Trial], Image.Image]:
    """What makes the pictures of built-in rows."""

    @cache
    def vae(digest: str) -> VAE:
        return VAE.load(vaes[digest].folder / "vae").to(device)

    @torch.no_grad()
    def make(trial: Trial) -> Image.Image:
        case, size = trial.case, sizes.of_scores(trial.case)
        if trial.model == IDENTITY:
            return resize(load_image(case.source), size)
        if trial.model == ORACLE:
            return resize(load_image(case.target), size)
        if trial.model == CLASSICAL_ROW:
            return CLASSICAL[case.task](resize(load_image(case.source), size))
        target = pixels01_from_image(resize(load_image(case.target), sizes.of_edit(case)))
        network = vae(trial.made_with["weights_digest"])
        pixels = pixels_from_pixels01(target[None]).to(device)
        latents = network.config.scale(network.encode(pixels).mode())
        return image_from_pixels01(pixels01_from_pixels(network.decode(latents)[0].float().cpu()))

    return make


def found_trials(cases: Sequence[Case], model: Model, sizes: Sizes) -> list[Trial]:
    """The pictures of a folder that was made elsewhere, one for each case.

    Raises: InputError for a case without a picture, or one that is damaged.
    """
    trials = []
    for case in cases:
        path = find_result(case, model)
        width, height = load_image(path).size
        wanted = image_size(case.target or case.source)
        if not 1 / ROUNDED < width * wanted[1] / (height * wanted[0]) < ROUNDED:
            raise InputError(
                f"{path} is {width} x {height}, its target {wanted[0]} x {wanted[1]}: expected the "
                "edit alone, in the same shape"
            )
        edit = key_of(
            ["picture", digest_file(path), sizes.of_scores(case)]
        )  # its scores depend on it
        trials.append(Trial(case, model, None, None, edit, {}))
    return trials


def find_result(case: Case, model: Model) -> Path:
    """The picture of a case in a folder of results, by the names that it may have."""
    stems = [str(Path(name).with_suffix("")) for name in case.results] or [case.name]
    paths = [model.folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    for path in paths:
        if path.is_file():
            return path
    raise InputError(
        f"{model.folder} has no result for {case.name!r}: expected {stems[0]}.png: complete the "
        "folder, or leave the model out"
    )
