"""The layer score: calibrated under the null of unrelated directions, whatever a layer's size."""

from __future__ import annotations

import numpy as np
import pytest

from gradprobe.statistics import normal_tail, pooled_cosine
from gradprobe.verdict.advice import layer_scores


def grams(truth, rows, noise, rng):
    """Gramians of noisy gradients about true ones (T, d) that stay as they are."""
    g = truth + noise * rng.normal(size=(rows, *truth.shape)) * np.linalg.norm(truth) / np.sqrt(truth.size)
    return g @ g.transpose(0, 2, 1)


def pair_at(cosine, size, rng):
    first, other = rng.normal(size=(2, size))
    first /= np.linalg.norm(first)
    other -= (other @ first) * first
    other /= np.linalg.norm(other)
    return np.stack([first, cosine * first + np.sqrt(1 - cosine**2) * other])


@pytest.mark.parametrize("size", [16, 256, 4096])
def test_unrelated_directions_are_rarely_called_a_conflict_whatever_the_size(size):
    """400 layers with two random directions each, that persist: averaging over rows does not make them orthogonal."""
    rng = np.random.default_rng(size)
    gram = np.stack([grams(rng.normal(size=(2, size)), 30, 0.5, rng) for _ in range(400)], axis=1)
    scores = layer_scores(gram, np.full(400, size))
    assert 0.01 < (normal_tail(scores.score) < 0.05).mean() < 0.09
    assert scores.conflicting.mean() < 0.01
    if size == 16:  # where a threshold, as in Recon, calls a fifth of the layers severe
        assert (scores.cosine < -0.2).mean() > 0.15


def test_a_large_layer_in_conflict_goes_before_a_small_one_with_a_lower_cosine():
    rng = np.random.default_rng(0)
    gram = np.stack([grams(pair_at(c, d, rng), 40, 0.3, rng) for c, d in ((-0.4, 16), (-0.3, 2000), (0.2, 2000))], 1)
    scores = layer_scores(gram, [16, 2000, 2000])
    assert scores.cosine[0, 0] < scores.cosine[1, 0]
    assert [layer for layer, _ in scores.ranked()] == [1, 0, 2]
    assert scores.conflicting[:, 0].tolist() == [False, True, False]


def test_the_interval_covers():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        gram = grams(pair_at(-0.3, 50, rng), 60, 0.6, rng)
        found = pooled_cosine(gram)
        # what the estimate is of: noise lengthens both gradients
        true = -0.3 / (1 + 0.36)
        hits += abs(found.mean[0] - true) < 1.96 * np.sqrt(found.variance[0])
    assert 0.90 <= hits / 200 <= 0.99


def test_the_noise_part_is_taken_off_where_it_is_known():
    rng = np.random.default_rng(2)
    truth, shared = pair_at(-0.3, 50, rng), rng.normal(size=(400, 1, 50)) / np.sqrt(50)
    g = truth + 1.5 * shared  # the same samples' noise in both tasks turns the sign
    gram = (g @ g.transpose(0, 2, 1))[:, None]
    noise = np.broadcast_to(2.25 * np.ones((2, 2)), gram.shape)
    assert layer_scores(gram, [50]).cosine[0, 0] > 0.3
    assert layer_scores(gram, [50], noise).cosine[0, 0] == pytest.approx(-0.3, abs=0.08)


def test_a_gradient_that_cannot_be_told_from_noise_has_no_angle():
    gram = np.ones((5, 1, 2, 2))
    assert np.isnan(layer_scores(gram, [4], gram * 2).cosine).all()
    assert np.isnan(layer_scores(gram[:2], [4]).score).all()
    assert layer_scores(gram * np.nan, [4]).ranked() == []
    assert not layer_scores(gram * np.nan, [4]).conflicting.any()


def test_rows_that_were_not_measured_do_not_count():
    rng = np.random.default_rng(3)
    gram = grams(pair_at(-0.3, 20, rng), 30, 0.3, rng)[:, None]
    holed = np.insert(gram, [4, 9], np.nan, axis=0)
    np.testing.assert_array_equal(layer_scores(holed, [20]).cosine, layer_scores(gram, [20]).cosine)
