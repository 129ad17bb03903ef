"""The text encoder against the reference, key prefixes, and cut instructions."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipx2p.errors import InputError
from ipx2p.models.text import TextEncoder
from tests.conftest import GOLDEN

PROMPTS = json.loads((GOLDEN / "golden.json").read_text())["prompts"]
WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden text encoder and tokenizer."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(GOLDEN / "diffusers" / part, tmp_path / part)
    return tmp_path


def test_states_match_the_reference(golden, editor, editor_v2):
    ids = editor.text.tokenize(PROMPTS)
    assert torch.equal(ids, golden["text.ids"])
    got = editor.text.encode(PROMPTS)
    torch.testing.assert_close(got, golden["text.out"], atol=1e-5, rtol=0)
    got = editor_v2.text.encode(PROMPTS)
    torch.testing.assert_close(got, golden["v2.text.out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [{}, {"embeddings.position_ids": torch.arange(77)[None]}])
@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_weights_load_with_and_without_the_prefix(folder, golden, prefix, extra):
    tensors = load_file(folder / WEIGHTS) | {f"text_model.{key}": t for key, t in extra.items()}
    renamed = {prefix + key.removeprefix("text_model."): t for key, t in tensors.items()}
    save_file(renamed, folder / WEIGHTS)
    states = TextEncoder.load(folder).encode(PROMPTS)
    torch.testing.assert_close(states, golden["text.out"], atol=1e-5, rtol=0)


def test_weights_are_saved_with_the_prefix_and_the_files_as_they_came(folder, tmp_path):
    TextEncoder.load(folder, dtype=None).save(tmp_path / "saved")
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert all(key.startswith("text_model.") for key in after)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "saved" / "text_encoder" / "config.json").read_text())
    assert config == json.loads((folder / "text_encoder" / "config.json").read_text())


@pytest.mark.parametrize("kept", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_either_form_of_the_tokenizer_is_enough(folder, golden, kept):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if name not in kept:
            (folder / "tokenizer" / name).unlink()
    assert torch.equal(TextEncoder.load(folder).tokenize(PROMPTS), golden["text.ids"])


def test_long_instruction_is_cut_with_a_warning_that_shows_the_cut(editor):
    short = " ".join(["rain"] * 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        num_tokens = len(editor.text.tokenizer(short, add_special_tokens=False)["input_ids"])
    words = "rain " * (75 * 75 // num_tokens) + "and the tail"
    with pytest.warns(UserWarning, match="this end of it is cut: '.*and the tail'"):
        ids = editor.text.tokenize([words])
    assert ids.shape == (1, 77)


def test_instruction_that_fits_is_not_cut(editor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.text.tokenize(["!" * 75])
    with pytest.warns(UserWarning, match="has 78 tokens, 77 fit; this end of it is cut: '!'"):
        editor.text.tokenize(["!" * 75 + " !"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "holds no tokenizer: expected tokenizer.json"),
        (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "no readable CLIP tokenizer"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "text_encoder/config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda f: (f / "text_encoder/config.json").write_text('{"model_type": "t5"}'),
            "model_type is 't5', expected 'clip_text_model'",
        ),
        (
            lambda f: (f / "text_encoder/config.json").write_text(
                '{"model_type": "clip_text_model", "hidden_act": "nope"}'
            ),
            "config.json: hidden_act is .nope.; known here: quick_gelu, gelu",
        ),
        (lambda f: (f / WEIGHTS).unlink(), "no weights in"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        TextEncoder.load(folder)
