"""What the experiments share: seeds, intervals, and what takes the place of v."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiments.common import in_place_of, interval, noise_like, seed_of, shuffled_like


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shuffled_update_has_the_same_elements_in_other_places() -> None:
    update = torch.randn(30, 40, generator=generator(5))
    shuffled = shuffled_like(update, generator())
    assert shuffled.shape == update.shape
    assert sorted(shuffled.flatten().tolist()) == sorted(update.flatten().tolist())
    assert (shuffled != update).float().mean() > 0.99


def test_noise_has_the_norm_of_the_update_and_not_its_direction() -> None:
    update = torch.randn(200, 300, generator=generator(5)) * 3
    noise = noise_like(update, generator())
    assert math.isclose(float(noise.norm()), float(update.norm()), rel_tol=1e-5)
    assert abs(float((noise * update).sum() / update.norm() ** 2)) < 5 / 60_000**0.5


def test_same_seeds_give_the_same_numbers() -> None:
    """These were recorded before the experiments shared the functions."""
    update = torch.arange(8.0)
    assert shuffled_like(update, generator(1)).tolist() == [5, 4, 2, 6, 7, 3, 1, 0]
    assert noise_like(update, generator(1)).tolist() == pytest.approx(
        [4.127238, 1.665768, 0.384903, 3.877396, -2.820167, -1.036753, -9.502997, 2.381939], abs=1e-5
    )
    assert seed_of("rl source", 1).random() == 0.10534897099641138
    assert float(torch.rand(())) == pytest.approx(0.25364214)


def test_what_takes_the_place_of_v_differs_from_the_sft_model_by_something_like_v() -> None:
    torch.manual_seed(0)
    sft, rl = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    before = {name: weights.clone() for name, weights in sft.named_parameters()}
    instead = in_place_of(sft, rl, 3, shuffled_like)
    for name, weights in instead.named_parameters():
        update, v = (weights - before[name]).flatten(), (rl.get_parameter(name) - before[name]).flatten()
        assert torch.allclose(update.sort()[0], v.sort()[0], atol=1e-6)
        assert not torch.allclose(update, v, atol=1e-3)


def test_interval_of_one_world_is_that_of_the_normal_law() -> None:
    people = (np.random.default_rng(1).random(400) < 0.3).astype(float)
    mean, low, high = interval([people])
    half = 1.96 * people.std() / 400**0.5
    assert mean == people.mean()
    assert low == pytest.approx(mean - half, abs=half / 5)
    assert high == pytest.approx(mean + half, abs=half / 5)


def test_interval_counts_how_worlds_differ() -> None:
    assert interval([np.zeros(40), np.ones(40)]) == (0.5, 0, 1)
    assert interval([np.full(40, 0.25)] * 3) == (0.25, 0.25, 0.25)
