"""What is measured: against numbers worked out by hand, and the formulas of published scripts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ipx2p.errors import InputError
from ipx2p.eval.cases import Case
from ipx2p.eval.networks import Networks
from ipx2p.eval.scores import METRICS, NEEDS, measure, pick_metrics, scored_by
from ipx2p.images import pixels01_from_image
from ipx2p.metrics import change_mask, haarpsi, invented, outside, psnr, share_outside, ssim
from tests.eval.tiny_networks import save_backbone, save_clip, save_dino

CPU = torch.device("cpu")
CAPTIONS = ("a cup", "a cup in the snow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_backbone(folder / "squeeze.pth", "squeezenet1_1")
    return folder


@pytest.fixture(scope="module")
def networks(folder):
    return Networks.load(CPU, clip=str(folder / "clip"), dino=str(folder / "dino"))


def flat(level, size=(24, 32)):
    return Image.new("RGB", (size[1], size[0]), (level,) * 3)


def noise(seed, size=(48, 64)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def case(**given):
    return Case("cup", Path("cup.png"), "make it snow", **given)


def test_metrics_of_flat_pictures_are_what_the_formulas_say():
    edited = flat(102)
    edited.paste((255, 255, 255), (0, 0, 32, 6))  # a quarter at the end of the range
    (got,) = [{name: x.item() for name, x in measure([edited], flat(51), flat(102)).items()}]
    assert got["change"] == pytest.approx(100 * (0.75 * 51 + 0.25 * 204) / 255)
    assert got["clipped"] == 25
    squares = 0.25 * (153 / 255) ** 2
    assert got["l1"] == pytest.approx(0.25 * 153 / 255)
    assert got["l2"] == pytest.approx(squares)
    assert got["psnr"] == pytest.approx(-10 * np.log10(squares))
    # luma of grey is 16 + 219 / 255 of its level
    assert got["psnr_y"] == pytest.approx(-10 * np.log10(0.25 * ((235 - 104) / 255) ** 2))
    assert not got.keys() & {name for name, metric in METRICS.items() if "clip" in metric.needs}


def test_a_target_of_its_own_is_compared_with_each_edit():
    edits, source, target = [noise(0), noise(1)], noise(2), noise(3)
    pixels = [pixels01_from_image(image)[None] for image in (*edits, source, target)]
    got = measure(edits, source, target)
    for place in (0, 1):
        for name, function in (("psnr", psnr), ("ssim", ssim)):
            assert got[name][place] == function(pixels[place], pixels[3])
        assert got["invented"][place] == invented(pixels[place], pixels[2], pixels[3])
    assert got["psnr"].dtype == torch.float64


def test_what_a_case_lacks_has_no_number(networks):
    got = measure([noise(0)], noise(1), networks=networks)
    of_source = {"psnr_source", "ssim_source", "haarpsi_source", "clip_image", "dino_source"}
    assert got.keys() == {"change", "clipped", "dino_structure", *of_source}
    small = measure([flat(1, (10, 12))], flat(2, (10, 12)), flat(3, (10, 12)))
    assert "psnr" in small and not small.keys() & {"ssim", "ssim_y", "invented"}
    assert [*measure([noise(0)], noise(1), noise(2), names=["ssim", "psnr"])] == ["ssim", "psnr"]


def test_the_unchanged_source_and_the_target_have_perfect_scores(networks):
    source, target = noise(0), noise(1)
    got = measure([source, target], source, target, CAPTIONS, networks=networks)
    assert got["change"][0] == got["clip_direction"][0] == got["dino_structure"][0] == 0
    assert got["clip_image"][0] == pytest.approx(1) and got["dino_source"][0] == pytest.approx(1)
    assert got["psnr"][1] == float("inf") and got["invented"][1] == 0
    assert got["clip_image_target"][1] == pytest.approx(1) and got["dino"][1] == pytest.approx(1)


JUDGED = {"judged", "judged_sc", "judged_pq"}
OF_LPIPS = {"lpips", "lpips_source", "outside_lpips", "background_lpips"}


def test_an_edit_has_the_same_scores_alone_and_among_others(networks):
    given = (noise(0), noise(1), CAPTIONS, torch.eye(48, 64), networks)
    together = measure([noise(2), noise(3), noise(2)], *given)
    alone = measure([noise(2)], *given)
    assert together.keys() == alone.keys() == METRICS.keys() - {"dists", *JUDGED, *OF_LPIPS}
    for name, values in together.items():
        assert values[0] == values[2] == alone[name][0], name


def test_source_and_captions_are_looked_at_once_for_all_edits(networks, monkeypatch):
    seen = []
    features, text = type(networks.clip).features, type(networks.clip).text
    monkeypatch.setattr(
        type(networks.clip), "features", lambda self, x: [seen.append("x"), features(self, x)][1]
    )
    monkeypatch.setattr(
        type(networks.clip), "text", lambda self, x: [seen.append(x), text(self, x)][1]
    )
    measure([noise(0), noise(1), noise(2)], noise(3), noise(4), CAPTIONS, networks=networks)
    assert sorted(seen) == sorted(["x"] * 5 + [*CAPTIONS])


@pytest.mark.parametrize("size", [(48, 64), (30, 40), (57, 44)])
def test_magicbrush_numbers_are_those_of_its_script(folder, size):
    """Formulas of evaluation/image_eval.py (OSU-NLP-Group/MagicBrush), on the edit as saved."""
    options = {"clip": str(folder / "clip"), "dino": str(folder / "dino")}
    networks = Networks.load(CPU, **options, preprocessing="crop")
    edited, target = noise(0, size), noise(1)
    names = ("l1", "l2", "clip_image_target", "dino", "clip_text")
    got = measure([edited], noise(2), target, CAPTIONS, None, networks, names, at_target=True)

    to_tensor = transforms.ToTensor()
    at_target = to_tensor(edited.resize(target.size))
    expected = {
        "l1": torch.nn.L1Loss()(at_target, to_tensor(target)).item(),
        "l2": torch.nn.MSELoss()(at_target, to_tensor(target)).item(),
    }

    def prepare(short, side, mean, std):
        bicubic = transforms.InterpolationMode.BICUBIC
        return transforms.Compose(
            [
                transforms.Resize(short, interpolation=bicubic),
                transforms.CenterCrop(side),
                to_tensor,
                transforms.Normalize(mean, std),
            ]
        )

    clip, dino = networks.clip.model, networks.dino.model
    openai = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    shown = prepare(32, 32, *openai)
    centre = prepare(32 * 256 // 224, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tokens = networks.clip.tokenizer(CAPTIONS[1], return_tensors="pt")
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(**tokens).pooler_output)
        images = [
            clip.visual_projection(clip.vision_model(shown(x)[None]).pooler_output)
            for x in (edited, target)
        ]
        classes = [dino(centre(x)[None]).last_hidden_state[:, 0] for x in (edited, target)]

    def cosine(u, v):
        u, v = (x[0].double().numpy() for x in (u, v))
        return u @ v / np.sqrt((u @ u) * (v @ v))

    expected["clip_image_target"] = cosine(*images)
    expected["clip_text"] = cosine(images[0], text)
    expected["dino"] = cosine(*classes)
    assert {name: x.item() for name, x in got.items()} == pytest.approx(expected, abs=1e-6)


def test_background_is_compared_with_both_pictures_black_where_they_may_change(folder):
    networks = Networks.load(CPU, clip=str(folder / "clip"), lpips=folder / "squeeze.pth")
    mask = torch.zeros(48, 64)
    mask[:, 20:50] = 1
    edited, source = noise(0), noise(1)
    got = measure([edited], source, None, CAPTIONS, mask, networks)
    outside = (1 - mask.numpy()[..., None]).astype(np.float32)
    a, b = (
        torch.from_numpy(np.asarray(x).astype(np.float32) / 255 * outside).permute(2, 0, 1)[None]
        for x in (edited, source)
    )
    mse = (a - b).square().mean().item()
    assert got["background_mse"].item() == pytest.approx(mse)
    assert got["background_psnr"].item() == pytest.approx(10 * np.log10(1 / mse))
    assert got["background_ssim"].item() == pytest.approx(ssim(a, b).item())
    assert got["background_lpips"].item() == pytest.approx(networks.lpips(a, b).item())
    inside = Image.fromarray(np.uint8(np.asarray(edited) * mask.numpy()[..., None]))
    alone = measure([inside], source, None, CAPTIONS, None, networks)
    assert got["clip_text_edited"].item() == alone["clip_text"].item()


def test_structure_distance_is_the_mean_squared_difference_of_all_cosines_of_keys(networks):
    """As PnPInversion measures: the mean squared error of both self-similarities."""
    edited, source = noise(0), noise(1)
    a, b = (networks.structure.look(pixels01_from_image(x))[0].numpy() for x in (edited, source))
    assert a.shape == b.shape and np.allclose(np.diag(a), 1, atol=1e-6)
    expected = ((a.astype(float) - b) ** 2).sum() / a.size
    assert expected > 1e-4
    for pair in ((edited, source), (source, edited)):
        got = measure(pair[:1], pair[1], networks=networks, names=["dino_structure"])
        assert got["dino_structure"].item() == pytest.approx(expected, rel=1e-6)


def pixels(*images):
    return [pixels01_from_image(image)[None] for image in images]


def retouched():
    """A picture, and its target, which differs in a square alone."""
    source, target = noise(0, (60, 80)), noise(0, (60, 80))
    target.paste((255, 0, 0), (10, 10, 30, 30))
    return source, target


def test_an_edit_is_compared_outside_of_what_its_target_changes(folder):
    networks = Networks.load(CPU, lpips=folder / "squeeze.pth")
    source, target = retouched()
    edited = target.copy()
    edited.paste((0, 255, 0), (12, 12, 28, 28))  # another change, in the same place
    worse = edited.copy()
    worse.paste((0, 0, 0), (60, 40, 70, 50))  # and one elsewhere
    got = measure([source, target, edited, worse], source, target, networks=networks)
    mask = change_mask(*pixels(source, target))
    assert 0.4 < share_outside(mask).item() < 0.7
    distances = {"psnr": psnr, "ssim": ssim, "haarpsi": haarpsi, "lpips": networks.lpips}
    perfect = {"psnr": float("inf"), "ssim": 1, "haarpsi": 1, "lpips": 0}
    for name, distance in distances.items():
        numbers = got[f"outside_{name}"]
        expected = outside(distance, *pixels(worse, source), mask).item()
        assert numbers.tolist() == pytest.approx([*[perfect[name]] * 3, expected]), name
        assert METRICS[f"outside_{name}"].better * (numbers[3] - numbers[2]) < 0
        assert got[f"{name}_source"][3] == distance(*pixels(worse, source)), name
    assert got["psnr"][2] < got["psnr"][1]  # how it follows is another matter


def test_a_mask_that_is_given_counts_instead_of_the_target():
    source, target = retouched()
    mask = torch.zeros(60, 80)
    mask[:, 40:] = 1
    got = measure([target], source, target, mask=mask, names=["outside_psnr"])
    expected = outside(psnr, *pixels(target, source), mask[None, None])
    assert got["outside_psnr"].item() == expected.item() < 20
    alone = measure([target], source, mask=mask, names=["outside_psnr"])
    assert alone["outside_psnr"] == got["outside_psnr"]


def test_outside_is_not_defined_where_nearly_everything_changes():
    source, target = retouched()
    names = ["psnr", "outside_psnr", "outside_haarpsi"]
    assert measure([target], source, noise(1, (60, 80)), names=names).keys() == {"psnr"}
    mask = torch.ones(60, 80)
    mask[5:55, 5:11] = 0  # of 50 x 70 positions with whole windows: 8.6 %
    assert not measure([target], source, mask=mask, names=names)
    mask[5:55, 11:13] = 0  # 11.4 %
    assert measure([target], source, mask=mask, names=names).keys() == {*names[1:]}
    small = [image.crop((0, 0, 30, 10)) for image in (target, source)]
    assert not measure(small[:1], small[1], mask=torch.zeros(10, 30), names=names)


def test_a_mask_of_everything_has_no_background(networks):
    got = measure([noise(0)], noise(1), None, CAPTIONS, torch.ones(48, 64), networks)
    assert not [name for name in got if name.startswith("background")]
    assert got["clip_text_edited"] == got["clip_text"]


def test_scores_tell_what_made_them(networks, folder):
    told = scored_by(["clip_text", "psnr", "dino_structure"], networks)
    assert told["clip_text"].startswith(f"{networks.clip}, code ")
    assert networks.clip.digest[:12] in told["clip_text"] and "32 x 32" in told["clip_text"]
    assert told["psnr"].startswith("at the edit's size, code ")
    assert "keys of the last layer" in told["dino_structure"]
    own = scored_by(["clip_text", "psnr"], networks, at_target=True)
    assert own["clip_text"] == told["clip_text"]
    assert own["psnr"].startswith("at the size of the target, bicubic, code ")
    published = Networks.load(CPU, clip=str(folder / "clip"), paper_compat=True)
    (compat,) = scored_by(["clip_image"], published).values()
    assert "pixels in [-1, 1] as the published script" in compat


def test_metrics_asked_for_need_what_they_need(networks):
    whole = case(target=Path("snow.png"), captions=CAPTIONS)
    none = Networks()
    usual = ["change", "clipped", "psnr", "ssim", "invented", "outside_haarpsi"]
    assert pick_metrics(None, [whole], none) == usual
    assert pick_metrics(["ssim", "l1", "psnr"], [whole], none) == ["psnr", "ssim", "l1"]
    usual = pick_metrics(None, [case(), whole], networks)
    assert usual[-2:] == ["clip_direction", "dino"]
    for asked, cases, message in (
        ("psnr", [case()], r"metric psnr needs targets \(target in the manifest, or --target\)$"),
        ("clip_image", [whole], r"metric clip_image needs a CLIP model \(--clip\)$"),
        ("clip_text", [case()], r"needs a CLIP model \(--clip\) and captions of targets"),
        ("background_psnr", [whole], "metric background_psnr needs masks"),
        ("outside_psnr", [case()], "metric outside_psnr needs targets, or masks"),
        ("pnsr", [whole], r"unknown metric 'pnsr'; did you mean psnr\?"),
    ):
        with pytest.raises(InputError, match=message):
            pick_metrics([asked], cases, none)


def test_every_metric_says_what_it_needs_and_how_it_reads():
    words = {1: "higher is better", 0: None, -1: "lower is better"}
    for name, metric in METRICS.items():
        assert set(metric.needs) <= NEEDS.keys(), name
        said = [word for word in words.values() if word and word in metric.about]
        assert said == ([words[metric.better]] if metric.better else []), name


def test_scales_are_chosen_by_what_compares_with_the_target():
    chosen = {name for name, metric in METRICS.items() if metric.chooses}
    of_target = {name for name, metric in METRICS.items() if "target" in metric.needs}
    assert chosen == of_target - {"invented"}
