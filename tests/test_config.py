"""Settings from defaults, YAML and overrides; every mistake names the key."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from ipx2p.config import config_differences, load_config, save_config
from ipx2p.errors import InputError


@dataclass
class Sizes:
    widths: list[int] = field(default_factory=lambda: [1, 2])
    depth: int | None = 3


@dataclass
class Train:
    steps: int = 10
    rate: float = 0.1
    name: str = "x"
    sizes: Sizes | None = None


@dataclass
class Settings:
    train: Train = field(default_factory=Train)
    must: str = MISSING


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("train:\n  steps: 4\nmust: given\n")
    return path


def test_overrides_beat_the_file_which_beats_the_defaults(path):
    settings = load_config(Settings, path, ["train.rate=1e-3", "train.sizes.depth=5"])
    assert settings == Settings(Train(4, 0.001, "x", Sizes([1, 2], 5)), "given")


def test_saved_settings_load_again(path, tmp_path):
    settings = load_config(Settings, path, ["train.sizes.widths=[3, 4]"])
    save_config(settings, tmp_path / "saved.yaml")
    assert load_config(Settings, tmp_path / "saved.yaml") == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", r"command line: unknown key train\.stepz; did you mean train\.steps\?"),
        ("trian.steps=1", r"unknown key trian; did you mean train\? known here: train, must"),
        ("steps=1", r"unknown key steps; .*known here: train, must"),
        ("train.sizes.width=[1]", r"train\.sizes\.width; did you mean train\.sizes\.widths"),
        ("train.steps=many", r"train\.steps: Value 'many' of type 'str' could not be converted"),
        ("train.steps=1.5", r"train\.steps: Value '1\.5' of type 'float' could not be converted"),
        ("train.steps=", r"train\.steps: Incompatible value 'None'"),
        ("train=3", r"train is 3, expected a group with keys steps, rate, name, sizes"),
        ("train.sizes.widths=3", r"train\.sizes\.widths is 3, expected a list such as \[3\]"),
        ("train.sizes.widths=[a]", r"train\.sizes\.widths\[0\]: Value 'a'"),
        ("train.steps", r"'train\.steps' is not an override, expected key=value"),
        ("train.steps=[1", "the value is not YAML"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(path, override, message):
    with pytest.raises(InputError, match=message):
        load_config(Settings, path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "is not YAML: .*line [12]"),
        ("- a", "holds a list, expected groups"),
        ("train: {}", "must must be set and is not"),
        ("train:\n  stepz: 3", r"settings\.yaml: unknown key train\.stepz; did you mean"),
        ("train: 3", "train is 3, expected a group"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(path, text, message):
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(Settings, path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"config file .*no\.yaml does not exist"):
        load_config(Settings, tmp_path / "no.yaml")
    with pytest.raises(InputError, match="is a folder, expected a YAML file"):
        load_config(Settings, tmp_path)


def test_differences_are_named_by_dotted_keys(path):
    old = load_config(Settings, path)
    new = load_config(Settings, path, ["train.steps=5", "train.sizes.depth=9"])
    assert config_differences(old, old) == []
    changed = {key: (before, after) for key, before, after in config_differences(old, new)}
    assert changed["train.steps"] == (4, 5)
    assert changed["train.sizes.depth"] == (None, 9)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.env:IPX2P_ABSENT}", "steps: .*IPX2P_ABSENT' not found"),
        ("${oc.env:IPX2P_SECRET}", "steps"),
        ("${train.steps}", "steps: .*ecursi"),
        ("${nowhere}", "steps: .*nowhere"),
        ("${", "steps|YAML"),
        ("${a b}", "steps|YAML"),
        ("${unknown:1}", "steps: .*unknown"),
    ],
)
def test_an_interpolation_that_fails_is_one_line(path, monkeypatch, value, message):
    monkeypatch.setenv("IPX2P_SECRET", "hunter2")
    path.write_text(f"train:\n  steps: '{value}'\nmust: given\n")
    with pytest.raises(InputError, match=message) as raised:
        load_config(Settings, path)
    assert "\n" not in str(raised.value)
