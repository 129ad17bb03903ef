"""The cache of latents and text states: what it holds, and when it encodes again."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ipx2p.data.cache
from ipx2p.data.cache import Cache
from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.pairs import ManifestPairs
from ipx2p.data.workers import micro_batches
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.models.text import TextEncoder
from ipx2p.models.vae import VAE
from tests.conftest import GOLDEN

LINES = [
    {"source": "0.png", "target": "1.png", "instruction": ["one", "two"], "task": "a"},
    {"source": "2.png", "target": "3.png", "instruction": "two", "task": "b"},
    {"source": "1.png", "target": "2.png", "instruction": "three", "task": "a"},
]


@pytest.fixture(scope="module")
def encoders():
    return VAE.load(GOLDEN / "diffusers" / "vae").eval(), TextEncoder.load(GOLDEN / "diffusers")


@pytest.fixture
def folder(tmp_path):
    """Four square pictures and a manifest of three pairs."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    write(tmp_path, LINES)
    return tmp_path


def write(folder, lines):
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def fill(folder, encoders, monkeypatch, capsys):
    """Fill the cache; gives it, how many pairs were encoded for it, and what was printed."""
    encode, encoded = ipx2p.data.cache._encode, []
    monkeypatch.setattr(
        ipx2p.data.cache, "_encode", lambda *a, **k: encoded.append(1) or encode(*a, **k)
    )

    def fill(framing=Framing(32), seed=0, encoders=encoders, workers=0):  # noqa: B008
        encoded.clear()
        pairs = ManifestPairs(folder / "pairs.jsonl")
        cache = Cache(folder / "cache", pairs, framing, seed=seed, world=World())
        cache.fill(*encoders, workers=workers)
        return cache, len(encoded), capsys.readouterr().out

    return fill


def batch(stream, count):
    [batch] = micro_batches(stream, StepSampler(range(1), count), workers=0)
    return batch


@pytest.mark.parametrize("framing", [Framing(32), Framing(32, max_zoom=2.0, draws=2)])
def test_it_holds_what_the_encoders_say_of_the_same_samples(fill, encoders, framing):
    cache, encoded, _ = fill(framing, workers=1)
    assert encoded == 3 * (framing.draws or 1)
    vae, text = encoders
    pictures = batch(SampleStream(cache.pairs, framing, seed=0), 24)
    held = batch(cache.stream(), 24)
    assert (held.indices, held.tasks) == (pictures.indices, pictures.tasks)
    with torch.no_grad():
        target, source = vae.encode(pictures.target_pixels), vae.encode(pictures.source_pixels)
        states = text.encode(pictures.instructions)
    close = {"atol": 2e-3, "rtol": 2e-3}  # float16
    torch.testing.assert_close(held.target_mean.float(), target.mean, **close)
    torch.testing.assert_close(held.target_logvar.float(), target.logvar, **close)
    torch.testing.assert_close(held.source_latents.float(), source.mode(), **close)
    torch.testing.assert_close(held.text.float(), states, **close)
    assert {"one", "two", "three"} == {*pictures.instructions}


def test_a_sentence_is_stored_once_and_the_empty_one_too(fill):
    cache, _, _ = fill()
    assert len(cache.text.places) == 4
    assert not torch.equal(cache.stream().states(""), cache.stream().states("one"))


def test_nothing_is_encoded_twice(fill, folder):
    assert fill()[1] == 3
    assert fill()[1] == 0
    write(folder, LINES[::-1])  # the order does not matter, nor do the other pairs
    assert fill()[1] == 0
    write(folder, [*LINES, LINES[0] | {"source": "3.png"}])
    assert fill()[1] == 1
    write(folder, [LINES[0] | {"instruction": "four"}])
    cache, encoded, _ = fill()
    assert encoded == 0 and len(cache.text.places) == 5


def test_what_changed_is_encoded_again(fill, folder, encoders):
    fill()
    Image.new("RGB", (40, 40), "teal").save(folder / "3.png")
    assert fill()[1] == 1
    assert fill(Framing(24))[1] == 3
    assert fill(Framing(32, flip=False))[1] == 3
    assert fill(Framing(32, draws=1))[1] == 3
    assert fill(Framing(32, draws=1), seed=1)[1] == 3
    other = VAE.load(GOLDEN / "diffusers" / "vae").eval()
    with torch.no_grad():
        other.quant_conv.bias[0] += 1e-6
    assert fill(encoders=(other, encoders[1]))[1] == 3
    text = TextEncoder.load(GOLDEN / "diffusers")
    with torch.no_grad():
        next(text.parameters()).mul_(1.001)
    cache, encoded, _ = fill(encoders=(encoders[0], text))
    assert encoded == 0 and len([*(cache.folder / "text").iterdir()]) == 2


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty"])
def test_a_damaged_shard_is_named_and_rebuilt(fill, kind):
    cache, _, _ = fill()
    before = batch(cache.stream(), 6)
    [shard] = (cache.folder / "latents").iterdir()
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.unlink()
    shard.write_bytes({"flipped": content, "cut": content[:-50], "empty": b""}[kind])
    cache, encoded, out = fill()
    assert encoded == 3 and f"warning: {shard} is damaged" in out
    for name, tensor in vars(batch(cache.stream(), 6)).items():
        assert name in ("tasks", "indices") or torch.equal(tensor, getattr(before, name))
    assert fill()[1] == 0


def test_a_shard_that_another_run_is_writing_is_left_alone(fill, folder):
    fill()
    writing = folder / "cache" / "latents" / ".0123.safetensors"
    writing.write_bytes(b"half")
    assert fill()[1] == 0 and writing.exists()


@pytest.mark.parametrize(("limit", "shards"), [(1, 3), (1000, 2), (2**27, 1)])
def test_shards_are_limited_in_bytes(fill, monkeypatch, limit, shards):
    """A row has 768 bytes: three tensors of (2, 4, 4, 4) in float16."""
    monkeypatch.setattr(ipx2p.data.cache, "SHARD_BYTES", limit)
    cache, _, _ = fill()
    assert len([*(cache.folder / "latents").iterdir()]) == shards
    assert fill()[1] == 0


def test_what_killed_writes_left_is_removed(fill, folder):
    fill()
    for place in (folder / "cache", folder / "cache" / "text", folder / "cache" / "latents"):
        (place / ".0123456789abcdef.safetensors").touch()
        os.utime(place / ".0123456789abcdef.safetensors", (0, 0))
    assert fill()[1] == 0
    assert not [*(folder / "cache").rglob(".*")]


def test_a_shard_that_is_gone_is_one_error(fill):
    cache, _, _ = fill()
    shutil.rmtree(cache.folder / "latents")
    with pytest.raises(InputError, match="cannot read .*latents.* to encode its rows again"):
        batch(cache.stream(), 2)


def test_lost_or_damaged_notes_on_files_cost_a_read_only(fill, folder):
    fill()
    (folder / "cache" / "files.json").write_text('{"a": 1')
    assert fill()[1] == 0
    assert len(json.loads((folder / "cache" / "files.json").read_text())) == 4


def test_cuts_that_are_drawn_at_each_visit_are_refused(fill, folder):
    Image.new("RGB", (40, 30)).save(folder / "2.png")
    Image.new("RGB", (40, 30)).save(folder / "3.png")
    write(folder, LINES[:2])
    with pytest.raises(InputError, match=r"pairs\.jsonl line 2: .*40 x 30.* set data\.draws"):
        fill()
    assert fill(Framing(32, draws=3))[1] == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_used_is_named_and_the_rest_is_kept(fill, folder, workers):
    original = folder / "3.png"
    shutil.copy(original, folder / "kept.png")
    original.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"pairs\.jsonl line 2: .*3\.png: not a picture"):
        fill(workers=workers)
    original.unlink()
    with pytest.raises(InputError, match=r"pairs\.jsonl line 2: .*3\.png"):
        fill()
    (folder / "kept.png").rename(original)
    assert fill()[1] == 2


def test_latents_that_are_not_finite_are_refused(fill, encoders):
    broken = VAE.load(GOLDEN / "diffusers" / "vae").eval()
    with torch.no_grad():
        broken.quant_conv.bias[0] = 1e6  # more than float16 holds
    with pytest.raises(InputError, match="not finite in torch.float16"):
        fill(encoders=(broken, encoders[1]))
