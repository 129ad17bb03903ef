"""The endless stream of samples, addressed by a global index."""

import os
import signal
import tempfile

import pytest
import torch

from ipx2p.data.degradations.tasks import DegradeConfig
from ipx2p.data.listing import find_photos
from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.pairs import DegradedPhotos
from ipx2p.data.workers import micro_batches
from ipx2p.distributed import World
from ipx2p.errors import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def stream():
    photos = find_photos(ROOT / "assets" / "photos")[:5]
    return make_stream(photos)


def make_stream(photos, seed=0, draws=None):
    pairs = DegradedPhotos(photos, ["denoise", "enhance"], DegradeConfig())
    return SampleStream(pairs, Framing(16, max_zoom=2.0, draws=draws), seed=seed)


def take(stream, steps=range(4), batch_size=3, workers=0, **dealt):
    sampler = StepSampler(steps, batch_size, **dealt)
    return [*micro_batches(stream, sampler, workers=workers)]


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
    whole = take(stream, range(6))
    resumed = take(stream, range(4, 6))
    assert len(resumed) == 2
    for one, other in zip(whole[4:], resumed, strict=True):
        assert_same(one, other)


def test_workers_change_nothing(stream):
    for one, other in zip(take(stream), take(stream, workers=2), strict=True):
        assert_same(one, other)


def test_batch_size_does_not_change_the_samples(stream):
    small = torch.cat([batch.source_pixels for batch in take(stream, range(6), batch_size=2)])
    large = torch.cat([batch.source_pixels for batch in take(stream, range(2), batch_size=6)])
    assert torch.equal(small, large)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 3), (3, 2)])
def test_a_step_has_the_same_samples_however_it_is_dealt(size, accumulate):
    dealt = [
        [*StepSampler(range(5, 7), 12, accumulate=accumulate, world=World(rank, size))]
        for rank in range(size)
    ]
    assert {len(part) for parts in dealt for part in parts} == {12 // size // accumulate}
    for step in range(2):
        samples = [
            index
            for parts in dealt
            for part in parts[step * accumulate : (step + 1) * accumulate]
            for index in part
        ]
        assert samples == [*range((5 + step) * 12, (6 + step) * 12)]


def test_fixed_draws_come_again_but_for_the_mirroring(stream):
    fixed = make_stream(stream.pairs.photos, draws=2)
    count = len(fixed.pairs)
    visits = {}
    for index in range(8 * count):
        item, epoch = fixed.order(index)
        draw, mirrored, _ = fixed.visit(index, item, epoch)
        visits.setdefault((item, draw), []).append((index, mirrored))
    assert len(visits) == 2 * count and {len(found) for found in visits.values()} == {4}
    assert {mirrored for found in visits.values() for _, mirrored in found} == {False, True}
    for found in [*visits.values()][:4]:
        pictures = [(fixed[index][1].source_pixels01, mirrored) for index, mirrored in found]
        upright = [picture.flip(-1) if mirrored else picture for picture, mirrored in pictures]
        assert all(torch.equal(picture, upright[0]) for picture in upright)
    one, other = (fixed[visits[0, draw][0][0]][1].target_pixels01 for draw in range(2))
    assert not torch.equal(one, other)


def test_a_fixed_draw_does_not_hang_on_its_place_among_the_pairs(stream):
    fewer, more = (make_stream(photos, draws=1) for photos in
                   (stream.pairs.photos[2:3], stream.pairs.photos))  # fmt: skip
    one, other = (s.framing.fixed_pictures(s.pairs, item, 0, 0)
                  for s, item in ((fewer, 0), (more, 4)))  # fmt: skip
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_every_epoch_holds_every_pair_once_in_its_own_order(stream):
    count = len(stream.pairs)
    epochs = [[stream.order(e * count + i)[0] for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_of_one_pair_differ_between_epochs(stream):
    count = len(stream.pairs)
    first = {stream.order(i)[0]: i for i in range(count)}
    second = {stream.order(count + i)[0]: count + i for i in range(count)}
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


class Killed(SampleStream):
    """A stream whose worker is killed, as the system does when memory runs out."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(stream):
    killed = Killed(stream.pairs, stream.framing, seed=0)
    with pytest.raises(InputError, match=r"a data worker was killed.*lower data\.workers \(1\)"):
        take(killed, workers=1)


def test_a_temporary_folder_too_deep_for_workers_is_named(stream, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 80 * "x")
    with pytest.raises(InputError, match="set TMPDIR to a shorter one"):
        take(stream, workers=1)
