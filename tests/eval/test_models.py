"""Models as they are typed, and the rows that need none."""

import shutil

import pytest
from PIL import Image

from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError
from ipx2p.eval.built_in import autoencoders, built_in_trials, find_result, found_trials
from ipx2p.eval.cases import Case, Sizes
from ipx2p.eval.models import EvalConfig, Model, parse_models
from ipx2p.models.vae import VAE
from tests.conftest import GOLDEN, golden_folder
from tests.eval.conftest import WEIGHTS


def parse(*texts):
    return parse_models(EvalConfig(models=[str(text) for text in texts]))


@pytest.fixture
def runs(tmp_path):
    """Weights of two runs, and one without a run, by link."""
    for name in ("a/weights", "b/weights", "c", "x=y@z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(WEIGHTS)
    return tmp_path


def test_a_model_is_called_by_the_end_of_its_path_that_tells_it_apart(runs):
    names = [model.name for model in parse(runs / "a/weights", runs / "b/weights", runs / "c")]
    assert names == ["a", "b", "c"]
    (runs / "d").mkdir()
    (runs / "d/a").symlink_to(WEIGHTS)
    assert [m.name for m in parse(runs / "a/weights", runs / "d/a")] == [f"{runs.name}/a", "d/a"]
    [model] = parse(f"my model={runs}/c")
    assert (model.name, model.source) == ("my model", f"{runs}/c")
    [model] = parse(runs / "x=y@z")  # a path that is there is a path
    assert model.folder == runs / "x=y@z"


def test_a_model_has_settings_of_its_own_and_the_others_from_the_command(runs):
    stack = "ip2p+apg:eta=0,norm=7.5"
    one, two = parse(f"{runs}/c@guidance={stack},guidance_scale=3,num_steps=5", runs / "a/weights")
    [settings] = one.settings
    assert (settings.guidance, settings.guidance_scale, settings.num_steps) == (stack, 3.0, 5)
    assert settings.image_guidance_scale == EditSettings.image_guidance_scale
    assert two.settings == (EditSettings(),)


def test_each_model_is_edited_as_its_folder_says_unless_told_otherwise(runs, tmp_path):
    own = golden_folder(tmp_path / "own", sampler="euler", spacing="trailing", guidance_scale=1.5)
    plain, says = parse(runs / "c", own)
    assert plain.settings == (EditSettings(),)
    assert says.settings == (EditSettings("euler", "trailing", guidance_scale=1.5),)

    config = EvalConfig([str(own), f"b={runs}/c@sampler=ddim"], guidance_scale=[2.0, 3.0])
    says, plain = parse_models(config)  # options are for all of them, suffixes for one
    assert says.settings == tuple(
        EditSettings("euler", "trailing", guidance_scale=scale) for scale in (2.0, 3.0)
    )
    assert [one.sampler for one in plain.settings] == ["ddim", "ddim"]
    assert parse(f"{own}@spacing=karras")[0].settings[0].sampler == "euler"


def test_one_model_with_several_settings_is_one_model(runs):
    [model] = parse(runs / "c", f"{runs}/c@guidance_scale=1", f"{runs}/c@guidance_scale=1")
    assert [settings.guidance_scale for settings in model.settings] == [7.0, 1.0]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["identity={c}"], "'identity' is a built-in row: write OTHER_NAME="),
        (["x={c}", "x={v2}"], "two of them are called 'x': write NAME=WEIGHTS"),
        (["{c}@scale=2"], r"no setting 'scale'; "),
        (["{c}@guidance_scale=two"], "guidance_scale is 'two', expected a number"),
        (["{c}@guidance=apgg"], "apgg"),
        (["{c}@fidelity=mask:levels=2,threshold=2"], "mask:threshold is '2', out of range"),
        (["{photos}@guidance_scale=1"], "holds pictures, which take no settings"),
    ],
)
def test_models_that_cannot_be_get_one_line(runs, texts, message):
    photos = runs / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    places = {"c": runs / "c", "v2": GOLDEN / "diffusers_v2", "photos": photos}
    with pytest.raises(InputError, match=message):
        parse(*(text.format(**places) for text in texts))


def test_built_in_rows_are_those_that_can_be(tmp_path):
    for name, value in (("a", 10), ("b", 20)):
        Image.new("RGB", (16, 16), (value, 0, 0)).save(tmp_path / f"{name}.png")
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    models, sizes = parse(WEIGHTS), Sizes(16, 8)

    def rows(case, models=models):
        return [trial.model for trial in built_in_trials([case], autoencoders(models), sizes)]

    assert rows(Case("a", source, "x")) == ["identity"]
    pair = Case("a", source, "x", "denoise", target)
    assert rows(pair) == ["identity", "oracle", "vae", "classical"]
    other = shutil.copytree(WEIGHTS, tmp_path / "other")
    vae = VAE.load(WEIGHTS / "vae", None)
    vae.save(other / "vae")  # with other bytes, as train.py writes it
    assert rows(pair, parse(WEIGHTS, other)).count("vae") == 1
    next(vae.parameters()).data += 1
    vae.save(other / "vae")
    assert rows(pair, parse(WEIGHTS, other)).count("vae") == 2  # of different autoencoders


def test_results_made_elsewhere_are_found_by_their_names(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "source.png")
    folder = tmp_path / "theirs"
    (folder / "139").mkdir(parents=True)
    image.save(folder / "139" / "139_1.png")
    image.save(folder / "own.jpg")
    model = Model("theirs", str(folder), folder)
    official = Case("139-1", tmp_path / "source.png", "x", results=("139/139_1.png", "139/x.png"))
    own = Case("own", tmp_path / "source.png", "x")
    assert (
        find_result(official, model).name == "139_1.png"
        and find_result(own, model).name == "own.jpg"
    )
    assert len(found_trials([official, own], model, Sizes(8, 8))) == 2
    with pytest.raises(InputError, match="has no result for 'gone': expected gone.png"):
        found_trials([Case("gone", tmp_path / "source.png", "x")], model, Sizes(8, 8))
