"""What is measured: against numbers worked out by hand, and CLIP against its own pieces."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ipx2p.errors import InputError
from ipx2p.eval.cases import cases_of_manifest
from ipx2p.eval.features import ClipFeatures, direction_similarity
from ipx2p.eval.rows import Rows, key_of
from ipx2p.eval.scores import METRICS, identity_key, measure, pick_metrics, score_key
from tests.eval.conftest import run

pytestmark = pytest.mark.usefixtures("no_curves")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipFeatures.load(str(clip_folder), CPU)


def flat(value):
    return torch.full((1, 3, 16, 16), value)


def test_metrics_of_flat_pictures_are_what_the_formulas_say():
    edited = flat(0.5)
    edited[0, :, :4] = 1.0  # a quarter at the end of the range
    got = measure(edited, source=flat(0.4), target=flat(0.5))
    assert got["change"].item() == pytest.approx(100 * (0.75 * 0.1 + 0.25 * 0.6), abs=1e-4)
    assert got["clipped"].item() == 25
    # mean squared difference 0.25 * 0.5^2 = 1/16: 10 log10(16) dB
    assert got["psnr"].item() == pytest.approx(12.0412, abs=1e-4)
    assert 0 < got["ssim"].item() < 1
    assert not got.keys() & {"clip_image", "clip_direction"}


def test_direction_similarity_is_the_cosine_of_both_changes():
    source, edited = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    change = (edited - source).tolist()  # (-0.4, 0.8)
    texts = torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.6])  # (0.8, -0.4)
    dot = change[0] * 0.8 + change[1] * -0.4
    expected = dot / ((0.16 + 0.64) ** 0.5) ** 2
    assert direction_similarity(source, edited, *texts).item() == pytest.approx(expected)
    for same in (source, source + 1e-7):  # rounding is no change
        assert direction_similarity(source, same, *texts).item() == 0


def test_clip_features_are_those_of_the_whole_model(clip, generator):
    pixels01 = torch.rand(2, 3, 20, 28, generator=generator)
    square = F.interpolate(pixels01, (32, 32), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    sentences = ["a cup", "a cup of coffee in the snow"]
    tokens = clip.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(pixel_values=(square - mean) / std, **tokens)
    torch.testing.assert_close(clip.images(pixels01), whole.image_embeds)
    torch.testing.assert_close(clip.texts(sentences), whole.text_embeds)
    assert clip.images(pixels01).norm(dim=-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("spoil", [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x / 0])
def test_clip_refuses_another_range(clip, spoil):
    pixels01 = torch.linspace(0.1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with pytest.raises(InputError, match=r"CLIP: expected finite values in \[0, 1\], got"):
        clip.images(spoil(pixels01))


def test_long_captions_are_cut_to_what_the_model_takes(clip):
    assert clip.texts(["snow " * 300]).isfinite().all()


def test_a_folder_without_all_of_clip_is_refused(tmp_path, clip_folder):
    with pytest.raises(InputError, match="is no folder with a CLIP model"):
        ClipFeatures.load(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(InputError, match="holds no CLIP model with a tokenizer"):
        ClipFeatures.load(str(tmp_path), CPU)
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no whole CLIP model: \d+ tensors are missing"):
        ClipFeatures.load(str(tmp_path), CPU)


def test_clip_named_later_is_measured_without_editing_again(
    copied, arguments, clip_folder, capsys, monkeypatch
):
    monkeypatch.setattr("ipx2p.editing.editor.Editor.load", None)
    extra = ["--output", copied, "--clip", clip_folder, "--grids", 0]
    code, _, err = run(capsys, *arguments, *extra)
    assert code == 0, err
    table = (copied / "table.md").read_text()
    assert "CLIP direction similarity" in table and "No CLIP" not in table
    assert f"CLIP: {clip_folder}, pictures resized to 32 x 32" in table


def test_the_identity_is_measured_as_the_source_unchanged(finished, manifest):
    scores = Rows(finished, "scores")
    for case in cases_of_manifest(manifest):
        row = scores.by_key[score_key(identity_key(case, 16), case, None)]
        assert row["change"] == 0
        source, target = (
            torch.tensor(np.asarray(image)).double() / 255
            for image in (case.load(16, 1), case.load_target((16, 16)))
        )
        expected = -10 * (source - target).square().mean().log10().item()
        assert row["psnr"] == pytest.approx(expected, abs=1e-6)


def test_scores_belong_to_a_target_a_clip_model_and_captions(manifest):
    from dataclasses import replace

    case = cases_of_manifest(manifest)[0]
    cases = [case, replace(case, target=case.source), replace(case, captions=None)]
    assert len({score_key("edit", one, None) for one in cases}) == 3
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_a_further_metric_is_measured_on_edits_that_have_scores(manifest, monkeypatch):
    case = cases_of_manifest(manifest)[0]
    before = score_key("edit", case, None)
    monkeypatch.setitem(METRICS, "new", METRICS["change"])
    assert score_key("edit", case, None) != before


def test_metrics_asked_for_need_what_they_need(manifest):
    with_all = cases_of_manifest(manifest)
    assert pick_metrics(None, with_all, True)[-1] == "clip_direction"
    assert pick_metrics(["ssim", "psnr"], with_all, False) == ["psnr", "ssim"]
    with pytest.raises(InputError, match=r"metric clip_image needs a CLIP model \(--clip\)"):
        pick_metrics(["clip_image"], with_all, False)
    with pytest.raises(InputError, match=r"unknown metric 'pnsr'; did you mean psnr\?"):
        pick_metrics(["pnsr"], with_all, False)
