"""Networks: against their own pieces, put together as the published scripts do it."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

from ipx2p.errors import InputError
from ipx2p.eval.networks import Clip, Networks, direction_similarity
from tests.eval.tiny_networks import save_backbone, save_clip, save_dino

CPU = torch.device("cpu")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES = ("alexnet", "squeezenet1_1", "vgg16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    for name in BACKBONES:
        save_backbone(folder / f"{name}.pth", name)
    return folder


@pytest.fixture(scope="module")
def networks(folder):
    return Networks.load(CPU, clip=str(folder / "clip"), dino=str(folder / "dino"))


@pytest.fixture
def pictures(generator):
    """Two pictures of different sizes, in whole levels."""
    sizes = ((44, 60), (50, 36))
    return [torch.randint(256, (3, *size), generator=generator).float() / 255 for size in sizes]


def looks(network, pictures):
    return torch.cat([network.look(picture) for picture in pictures])


def image(pixels01):
    return Image.fromarray((pixels01 * 255).round().byte().permute(1, 2, 0).numpy())


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def clip_of(clip, shown):
    return unit(clip.model.visual_projection(clip.model.vision_model(shown).pooler_output))


def normalized(pixels, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def test_square_clip_features_are_those_of_the_whole_model(networks, pictures):
    clip, sentences = networks.clip, ["a cup", "a cup of coffee in the snow"]
    squares = [F.interpolate(p[None], (32, 32), mode="bicubic") for p in pictures]
    tokens = clip.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        shown = normalized(torch.cat(squares), CLIP_MEAN, CLIP_STD)
        whole = clip.model(pixel_values=shown, **tokens)
    torch.testing.assert_close(looks(clip, pictures), whole.image_embeds)
    torch.testing.assert_close(
        torch.cat([clip.text(sentence) for sentence in sentences]), whole.text_embeds
    )
    assert looks(clip, pictures).norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert str(clip).endswith("resized to 32 x 32")


def centres(pictures, short, mean, std):
    """As torchvision prepares them: the shorter side bicubic, the centre, normalized."""
    prepare = transforms.Compose(
        [
            transforms.Resize(short, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return torch.stack([prepare(image(picture)) for picture in pictures])


def test_cropped_clip_features_are_those_of_clips_own_preparation(networks, pictures):
    clip = Clip(networks.clip.model, networks.clip.tokenizer, "tiny", "crop", paper_compat=True)
    shown = centres(pictures, 32, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(looks(clip, pictures), clip_of(clip, shown))
    assert str(clip) == f"tiny ({networks.clip.digest[:12]}), shorter side bicubic to 32, centre 32"


def test_paper_compat_shows_clip_pixels_in_minus_one_to_one(networks, pictures, folder):
    published = Networks.load(CPU, clip=str(folder / "clip"), paper_compat=True).clip
    square = F.interpolate(2 * pictures[0][None] - 1, (32, 32), mode="bicubic")
    expected = clip_of(published, normalized(square, CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(looks(published, pictures[:1]), expected)
    assert "pixels in [-1, 1] as the published script" in str(published)
    assert (looks(published, pictures) - looks(networks.clip, pictures)).abs().max() > 1e-3


def test_dino_features_are_class_tokens_of_the_centre(networks, pictures):
    shown = centres(pictures, 36, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        tokens = networks.dino.model(shown).last_hidden_state[:, 0]
    torch.testing.assert_close(looks(networks.dino, pictures), unit(tokens))


@pytest.mark.parametrize("paper_compat", [False, True])
def test_structure_is_the_likeness_of_keys_of_the_last_layer(folder, pictures, paper_compat):
    dino = str(folder / "dino")
    structure = Networks.load(CPU, dino=dino, paper_compat=paper_compat).structure
    scale = 255 if paper_compat else 1
    size = (32, 32 * 60 // 44)
    resized = F.interpolate(
        scale * pictures[0][None], size, mode="bilinear", antialias=not paper_compat
    )
    model, weights = structure.model, load_file(folder / "dino" / "model.safetensors")
    with torch.no_grad():
        states = model(
            normalized(resized, IMAGENET_MEAN, IMAGENET_STD),
            output_hidden_states=True,
            interpolate_pos_encoding=True,
        ).hidden_states[-2]
    (name,) = (
        name.removesuffix("layernorm_before.weight")
        for name in weights
        if "2.layernorm_before.w" in name
    )
    last = {key.removeprefix(name): x for key, x in weights.items() if key.startswith(name)}
    norm = (last["layernorm_before.weight"], last["layernorm_before.bias"])
    states = F.layer_norm(states, (16,), *norm, eps=1e-12)
    weight, bias = (
        next(x for key, x in last.items() if key.endswith((f"key.{kind}", f"k_proj.{kind}")))
        for kind in ("weight", "bias")
    )
    keys = (states @ weight.T + bias)[0]  # (patches and class token, 16)
    assert len(keys) == 1 + 4 * 5
    cosines = (keys @ keys.T) / (keys.norm(dim=1)[:, None] * keys.norm(dim=1)[None])
    torch.testing.assert_close(looks(structure, pictures[:1])[0], cosines)
    assert ("0..255" in str(structure)) == paper_compat


@pytest.mark.parametrize("spoil", [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x / 0])
def test_networks_refuse_another_range(networks, folder, spoil):
    lpips = Networks.load(CPU, lpips=folder / "squeezenet1_1.pth").lpips
    pixels01 = torch.linspace(0.1, 1, 3 * 32 * 32).view(3, 32, 32)
    for look in (
        lambda x: networks.clip.look(x),
        lambda x: networks.dino.look(x),
        lambda x: networks.structure.look(x),
        lambda x: lpips(x[None], pixels01[None]),
        lambda x: lpips(pixels01[None], x[None]),
    ):
        with pytest.raises(InputError, match=r"expected finite values in \[0, 1\], got"):
            look(spoil(pixels01))


def test_long_captions_are_cut_to_what_the_model_takes(networks):
    assert networks.clip.text("snow " * 300).isfinite().all()


def test_direction_similarity_is_the_cosine_of_both_changes():
    source, edited = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    change = (edited - source).tolist()  # (-0.4, 0.8)
    texts = torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.6])  # (0.8, -0.4)
    dot = change[0] * 0.8 + change[1] * -0.4
    expected = dot / ((0.16 + 0.64) ** 0.5) ** 2
    assert direction_similarity(source, edited, *texts).item() == pytest.approx(expected)
    for same in (source, source + 1e-7):  # rounding is no change
        assert direction_similarity(source, same, *texts).item() == 0


# Layers after which LPIPS compares, in the numbers of torchvision's `features`.
TAPS = {
    "alexnet": (1, 4, 7, 9, 11),
    "squeezenet1_1": (1, 4, 7, 9, 10, 11, 12),
    "vgg16": (3, 8, 15, 22, 29),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_lpips_is_the_formula_of_its_paper_on_the_backbone_in_the_file(name, folder, generator):
    package = pytest.importorskip("lpips")
    path = folder / f"{name}.pth"
    lpips = Networks.load(CPU, lpips=path).lpips
    a, b = torch.rand(2, 2, 3, 40, 48, generator=generator)
    with torch.device("meta"):
        features = getattr(torchvision.models, name)(weights=None).features
    held = {k.removeprefix("features."): v for k, v in torch.load(path).items() if "feat" in k}
    features.load_state_dict(held, assign=True)
    short = {"alexnet": "alex", "squeezenet1_1": "squeeze", "vgg16": "vgg"}[name]
    top = next(iter(package.__path__)) + f"/weights/v0.1/{short}.pth"
    top = [*torch.load(top, map_location="cpu").values()]
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    x, y = ((2 * pixels01 - 1 - shift) / scale for pixels01 in (a, b))
    expected = torch.zeros(2)
    with torch.no_grad():
        for place, layer in enumerate(features[: TAPS[name][-1] + 1]):
            x, y = layer(x), layer(y)
            if place in TAPS[name]:
                weights = top[TAPS[name].index(place)]
                p, q = (F.normalize(z, dim=1) for z in (x.clone(), y.clone()))
                expected += (weights * (p - q) ** 2).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)
    assert lpips(a, a).tolist() == [0, 0]
    counted = torch.rand(2, 1, 40, 48, generator=generator)
    lpips.model.spatial = True
    with torch.no_grad():
        local = lpips.model(a, b, normalize=True)
    lpips.model.spatial = False
    expected = (local * counted).sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3))
    torch.testing.assert_close(lpips(a, b, counted), expected.double(), rtol=1e-4, atol=1e-6)
    assert not lpips.model.spatial and lpips(a, a, counted).tolist() == [0, 0]
    assert str(lpips) == f"LPIPS 0.1, {name} ({lpips.digest[:12]}), full size"


def test_dists_is_the_formula_of_its_paper_on_the_backbone_in_the_file(folder, generator):
    package = pytest.importorskip("DISTS_pytorch")
    dists = Networks.load(CPU, dists=folder / "vgg16.pth").dists
    a, b = torch.rand(2, 2, 3, 32, 40, generator=generator)
    held = torch.load(folder / "vgg16.pth")
    own = torch.load(next(iter(package.__path__)) + "/weights.pt", map_location="cpu")
    hann = torch.tensor(np.hanning(5)[1:-1]).float()
    hann = torch.outer(hann, hann) / hann.sum() ** 2

    def layers(x):
        """The picture, and what each block of VGG-16 gives, with L2 pooling (eq. 1) between."""
        found, x, place = [x], normalized(x, IMAGENET_MEAN, IMAGENET_STD), 0
        for block, length in enumerate((2, 2, 3, 3, 3)):
            if block:
                kernel = hann.expand(x.shape[1], 1, 3, 3)
                squares = F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1])
                x, place = (squares + 1e-12).sqrt(), place + 1
            for _ in range(length):
                weight, bias = (held[f"features.{place}.{kind}"] for kind in ("weight", "bias"))
                x, place = F.conv2d(x, weight, bias, padding=1).relu(), place + 2
            found.append(x)
        return found

    texture, structure = [], []
    for x, y in zip(layers(a), layers(b), strict=True):
        x, y = x.flatten(2), y.flatten(2)
        mean_x, mean_y = x.mean(dim=2), y.mean(dim=2)
        covariance = (x * y).mean(dim=2) - mean_x * mean_y
        variances = x.var(dim=2, correction=0) + y.var(dim=2, correction=0)
        texture.append((2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6))
        structure.append((2 * covariance + 1e-6) / (variances + 1e-6))
    alpha, beta = (own[name].detach().flatten() for name in ("alpha", "beta"))
    alike = torch.cat(texture, dim=1) @ alpha + torch.cat(structure, dim=1) @ beta
    expected = 1 - alike / (alpha.sum() + beta.sum())
    torch.testing.assert_close(dists(a, b), expected, rtol=1e-3, atol=1e-5)
    assert dists(a, a).tolist() == pytest.approx([0, 0], abs=1e-4)


def test_loading_leaves_the_random_numbers_of_others_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Networks.load(CPU, lpips=folder / "alexnet.pth", dists=folder / "vgg16.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert torchvision.models.vgg16.__module__ == "torchvision.models.vgg"


def test_a_folder_without_all_of_clip_is_refused(tmp_path, folder):
    def load(source):
        return Networks.load(CPU, clip=str(source))

    with pytest.raises(InputError, match="is not a folder with a CLIP model"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no CLIP model"):
        load(tmp_path)
    for path in (folder / "clip").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"not a complete CLIP model: \d+ tensors are missing"):
        load(tmp_path)
    for path in tmp_path.glob("*okenizer*"):
        path.unlink()
    (tmp_path / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    with pytest.raises(InputError, match="holds no tokenizer of (its )?CLIP"):
        load(tmp_path)


def test_a_folder_without_all_of_dino_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match="is not a folder with a DINO model.*dino-vits16"):
        Networks.load(CPU, dino=str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_bytes((folder / "dino" / "config.json").read_bytes())
    tensors = load_file(folder / "dino" / "model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not a complete DINO model: 1 tensors are missing"):
        Networks.load(CPU, dino=str(tmp_path))


@pytest.mark.parametrize("kind", ["lpips", "dists"])
def test_a_backbone_that_is_missing_or_not_whole_is_refused(kind, folder, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Networks.load(CPU, **{kind: tmp_path / "nowhere.pth"})
    tensors = torch.load(folder / "vgg16.pth")
    del tensors["features.28.weight"]
    torch.save(tensors, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"part.pth, read as vgg16, does not fit.*1 missing"):
        Networks.load(CPU, **{kind: tmp_path / "part.pth"})


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [("lpips", "lpips", "lpips"), ("dists", "DISTS_pytorch", "DISTS-pytorch")],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, folder, kind, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'{name} is not installed.*pip install -e "\.\[metrics'):
        Networks.load(CPU, **{kind: folder / "vgg16.pth"})
