"""The endless stream of samples, addressed by a global index."""

import pytest
import torch

from ipx2p.data.degrade import DegradeConfig
from ipx2p.data.loader import SampleStream, batches
from ipx2p.data.pairs import DegradedPhotos, find_photos
from ipx2p.errors import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def stream():
    photos = find_photos(ROOT / "assets" / "photos")[:5]
    return make_stream(photos)


def make_stream(photos, seed=0):
    pairs = DegradedPhotos(photos, ["denoise", "enhance"], DegradeConfig())
    return SampleStream(pairs, seed=seed, resolution=16, max_zoom=2.0, flip=True)


def take(stream, *, first_step=0, num_steps=4, batch_size=3, workers=0):
    return [
        *batches(
            stream,
            first_step=first_step,
            num_steps=num_steps,
            batch_size=batch_size,
            workers=workers,
        )
    ]


def test_batches_hold_the_samples_of_their_step(stream):
    got = take(stream)
    assert [batch.indices for batch in got] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert got[0].source_pixels.shape == got[0].target_pixels.shape == (3, 3, 16, 16)
    assert got[0].source_pixels.min() < -0.5 and got[0].source_pixels.max() > 0.3
    assert len(got[0].instructions) == len(got[0].tasks) == 3


def assert_same(one, other):
    assert one.indices == other.indices and one.instructions == other.instructions
    assert torch.equal(one.source_pixels, other.source_pixels) and torch.equal(
        one.target_pixels, other.target_pixels
    )


def test_a_resumed_stream_goes_on_where_it_was(stream):
    whole = take(stream, num_steps=6)
    resumed = take(stream, first_step=4, num_steps=6)
    assert len(resumed) == 2
    for one, other in zip(whole[4:], resumed, strict=True):
        assert_same(one, other)


def test_workers_change_nothing(stream):
    for one, other in zip(take(stream), take(stream, workers=2), strict=True):
        assert_same(one, other)


def test_batch_size_does_not_change_the_samples(stream):
    small = torch.cat([batch.source_pixels for batch in take(stream, batch_size=2, num_steps=6)])
    large = torch.cat([batch.source_pixels for batch in take(stream, batch_size=6, num_steps=2)])
    assert torch.equal(small, large)


def test_every_epoch_holds_every_pair_once_in_its_own_order(stream):
    count = len(stream.pairs)
    epochs = [[stream._item(e * count + i) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_of_one_pair_differ_between_epochs(stream):
    count = len(stream.pairs)
    first = {stream._item(i): i for i in range(count)}
    second = {stream._item(count + i): count + i for i in range(count)}
    a, b = stream[first[0]][1], stream[second[0]][1]
    assert a.task == b.task and not torch.equal(a.target_pixels01, b.target_pixels01)


def test_seeds_give_different_streams(stream):
    other = make_stream(stream.pairs.photos, seed=1)
    assert not torch.equal(stream[0][1].source_pixels01, other[0][1].source_pixels01)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_used_is_one_error_also_from_workers(tmp_path, workers):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"bad\.png: not a picture") as caught:
        take(make_stream([tmp_path / "bad.png"]), workers=workers)
    assert "Traceback" not in str(caught.value)
