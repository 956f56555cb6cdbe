"""The noise part of a Gramian against the formulas of equal shards, and against what it estimates."""

from __future__ import annotations

import numpy as np
import pytest

from gradprobe.statistics import noise_part


def parts(gradients, shares):
    """F and the micro-batches' sum, from gradients (m, T, d)."""
    mean = np.einsum("a,aid->id", shares, gradients)
    return mean @ mean.T, np.einsum("a,aid,ajd->ij", np.square(shares), gradients, gradients)


def test_equal_shares_give_the_textbook_formula():
    gradients = np.random.default_rng(0).normal(size=(4, 3, 7))
    whole, micro = parts(gradients, np.full(4, 0.25))
    mean_of_products = np.einsum("aid,ajd->ij", gradients, gradients) / 4
    np.testing.assert_allclose(noise_part(whole, micro, [0.25] * 4), (mean_of_products - whole) / 3, rtol=1e-12)


def test_it_is_a_quarter_of_the_sample_covariance_of_four():
    """Another road to the same number: the noise of a mean of m is the sample covariance over m."""
    gradients = np.random.default_rng(1).normal(size=(4, 2, 5))
    away = gradients - gradients.mean(0)
    covariance = np.einsum("aid,ajd->ij", away, away) / 3
    np.testing.assert_allclose(noise_part(*parts(gradients, np.full(4, 0.25)), [0.25] * 4), covariance / 4, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (6, 5, 5, 1), (2, 1)])
def test_it_is_unbiased_for_the_noise_of_the_whole_batch(sizes):
    """Samples with a covariance between two tasks that is known; micro-batches of any sizes."""
    rng, draws = np.random.default_rng(2), 20_000
    mixing = np.array([[1.0, 0.0], [0.8, 0.6]])  # the tasks' noise: correlation .8
    true = np.array([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.2]])
    shares = np.array(sizes) / sum(sizes)
    noise = np.einsum("ij,najd->naid", mixing, rng.normal(size=(draws, len(sizes), 2, 3)))
    gradients = true + noise / np.sqrt(sizes)[None, :, None, None]
    mean = np.einsum("a,naid->nid", shares, gradients)
    whole = np.einsum("nid,njd->nij", mean, mean)
    micro = np.einsum("a,naid,najd->nij", np.square(shares), gradients, gradients)
    found = noise_part(whole, micro, shares)
    expected = 3 * mixing @ mixing.T / sum(sizes)
    error = found.std(axis=0) / np.sqrt(draws)
    assert (np.abs(found.mean(axis=0) - expected) < 4 * error).all()
    assert (np.abs((whole - found).mean(axis=0) - true @ true.T) < 4 * (whole - found).std(axis=0) / draws**0.5).all()


def test_one_micro_batch_says_nothing_about_its_noise():
    assert np.isnan(noise_part(np.ones((3, 2, 2)), np.ones((3, 2, 2)), [1.0])).all()


def test_what_is_missing_stays_missing():
    whole = np.array([[1.0, np.nan], [np.nan, np.nan]])
    assert np.isnan(noise_part(whole, np.ones((2, 2)), [0.5, 0.5])).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], []])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        noise_part([[1.0]], [[1.0]], shares)
