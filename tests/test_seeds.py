"""Generators keyed by seed, purpose and index."""

import itertools

import torch

from ipx2p.seeds import generator, unit_noise


def test_equal_keys_give_equal_streams():
    assert torch.equal(unit_noise((3, 4), 1, "a", 2), unit_noise((3, 4), 1, "a", 2))


def test_every_part_of_the_key_counts():
    keys = [*itertools.product([0, 1, 12, 2**40, 2**63], ["a", "b"], [0, 1, 2])]
    draws = {tuple(unit_noise((4,), *key).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator(0, "a").initial_seed()
    unit_noise((3,), 0, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_over_indices():
    noise = torch.stack([unit_noise((16,), 0, "a", index) for index in range(4000)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbours) < 0.02
