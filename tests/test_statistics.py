"""Estimates, intervals and tests against independent twins, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradprobe import statistics as stats
from gradprobe.measures import cosine

finite = st.floats(-10, 10, allow_nan=False)
samples = hnp.arrays(np.float64, st.integers(2, 12), elements=finite)


def micro_gradients(rng, truth, rows, shares, noise, shared, runs=1):
    """(rows, runs, m, T, d): gradients of micro-batches whose noise has a part that all tasks share."""
    tasks, size = truth.shape
    shape = (rows, runs, len(shares))
    own = rng.normal(size=(*shape, tasks, size)) * np.sqrt(1 - shared)
    common = rng.normal(size=(*shape, 1, size)) * np.sqrt(shared)
    spread = noise / np.sqrt(size) / np.sqrt(shares)[:, None, None]  # a share of the samples has so much more noise
    return truth + spread * (own + common)


def two_matrices(micro, shares):
    """What a probe keeps of them: F of the mean, and the sum of alpha^2 times each micro-batch's own."""
    mean = np.einsum("a,...atd->...td", shares, micro)
    gram = mean @ np.swapaxes(mean, -1, -2)
    within = np.einsum("a,...atd,...aud->...tu", np.square(shares), micro, micro)
    return gram, within


def at_angle(value, size, lengths=(1.0, 1.0)):
    first, other = np.zeros((2, size))
    first[0], other[0], other[1] = 1.0, value, np.sqrt(1 - value**2)
    return np.stack([lengths[0] * first, lengths[1] * other])


EQUAL, UNEQUAL = np.full(4, 0.25), np.array([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("shares", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_the_noise_part_is_unbiased(shares):
    rng = np.random.default_rng(0)
    truth = at_angle(-0.3, 20, (1.0, 2.0))
    micro = micro_gradients(rng, truth, 40_000, shares, noise=1.5, shared=0.8)
    gram, within = two_matrices(micro, shares)
    found = (gram - stats.noise_part(gram, within, shares)).mean(axis=(0, 1))
    noise = 1.5**2
    np.testing.assert_allclose(found, truth @ truth.T, atol=0.02 * noise)  # a tenth of the noise is the requirement
    assert abs(gram.mean(axis=(0, 1))[0, 1] - (truth @ truth.T)[0, 1]) > 0.7 * noise  # what it corrects


def test_the_magnitude_similarity_is_that_of_the_true_gradients_and_not_of_their_noise():
    """Lengths 1 and 3: 2 * 3 / (1 + 9) = .6; with noise of length 4 on both, minibatches look equally long."""
    rng = np.random.default_rng(3)
    micro = micro_gradients(rng, at_angle(0.5, 20, (1.0, 3.0)), 4000, EQUAL, noise=4.0, shared=0.5)[:, 0]
    gram, within = two_matrices(micro, EQUAL)
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), 64)
    lengths = []  # the twin: from products of different micro-batches of the rows, summed
    for task in (0, 1):
        total = sum(float(row[a, task] @ row[b, task]) for row in micro for a in range(4) for b in range(4) if a != b)
        lengths.append(np.sqrt(total / (12 * len(micro))))
    twin = 2 * lengths[0] * lengths[1] / (lengths[0] ** 2 + lengths[1] ** 2)
    assert found.magnitude_similarity == pytest.approx([twin], rel=1e-9)
    assert twin == pytest.approx(0.6, abs=0.02)
    naive = np.sqrt(np.diagonal(gram.mean(axis=0)))
    assert 2 * naive[0] * naive[1] / (naive[0] ** 2 + naive[1] ** 2) > 0.9


def test_a_magnitude_that_cannot_be_told_from_noise_has_no_similarity():
    rng = np.random.default_rng(4)
    truth = np.stack([np.eye(20)[0], 0 * np.eye(20)[1], 2 * np.eye(20)[2]])
    micro = micro_gradients(rng, truth, 200, EQUAL, noise=1.0, shared=0.0)[:, 0]
    gram, within = two_matrices(micro, EQUAL)
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), 64)
    assert found.square_resolved.tolist() == [True, False, True]
    assert np.isnan(found.magnitude_similarity).tolist() == [True, False, True]  # the pairs 0|1, 0|2, 1|2
    assert found.magnitude_similarity[1] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_equal_shares_give_the_simple_formula(count):
    rng = np.random.default_rng(count)
    micro = rng.normal(size=(count, 3, 5))
    gram, within = two_matrices(micro, np.full(count, 1 / count))
    average = np.mean([g @ g.T for g in micro], axis=0)
    np.testing.assert_allclose(
        stats.noise_part(gram, within, np.full(count, 1 / count)), (average - gram) / (count - 1), atol=1e-12
    )


def test_the_corrected_gramian_is_that_of_pairs_of_different_micro_batches():
    """The twin: average <g_i^a, g_j^b> over all a != b, weighted by their shares."""
    rng = np.random.default_rng(1)
    micro = rng.normal(size=(4, 3, 5))
    gram, within = two_matrices(micro, UNEQUAL)
    total, weight = np.zeros((3, 3)), 0.0
    for a in range(4):
        for b in range(4):
            if a != b:
                total += UNEQUAL[a] * UNEQUAL[b] * micro[a] @ micro[b].T
                weight += UNEQUAL[a] * UNEQUAL[b]
    np.testing.assert_allclose(gram - stats.noise_part(gram, within, UNEQUAL), total / weight, atol=1e-12)


def test_one_micro_batch_shows_no_noise_and_wrong_shares_are_refused():
    assert np.isnan(stats.noise_part(np.eye(2), np.eye(2), [1.0])).all()
    for shares in ([0.5, 0.6], [1.5, -0.5], [0.0, 1.0]):
        with pytest.raises(ValueError, match="sum to 1"):
            stats.noise_part(np.eye(2), np.eye(2), shares)


def test_shared_samples_flip_the_sign_of_the_naive_cosine_and_not_of_ours():
    """Facts: true -.30 was read as +.45."""
    rng = np.random.default_rng(2)
    micro = micro_gradients(rng, at_angle(-0.3, 50), 4000, EQUAL, noise=1.5, shared=0.95)
    gram, within = two_matrices(micro[:, 0], EQUAL)
    assert cosine(gram.mean(axis=0))[0, 1] > 0.4
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), 64)
    assert found.cosine[0] == pytest.approx(-0.3, abs=0.02)
    assert found.low[0] < -0.3 < found.high[0] < 0
    assert found.noise_correlation[0] == pytest.approx(0.95, abs=0.01)
    np.testing.assert_allclose(found.noise_scale, 64 * 1.5**2, rtol=0.05)  # B * s with s = |noise|^2 / |gradient|^2


@pytest.mark.parametrize("rows", [6, 15, 60])
@pytest.mark.parametrize("true", [-0.6, 0.0, 0.3])
def test_intervals_of_the_cosine_cover(rows, true):
    rng, runs = np.random.default_rng(rows), 1500
    micro = micro_gradients(rng, at_angle(true, 25, (1.0, 3.0)), rows, EQUAL, noise=0.8, shared=0.5, runs=runs)
    gram, within = two_matrices(micro, EQUAL)
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), 32)
    told = np.isfinite(found.cosine[:, 0])
    covered = (found.low[told, 0] < true) & (true < found.high[told, 0])
    assert told.mean() > 0.97
    assert 0.92 <= covered.mean() <= 0.98
    assert found.cosine[told, 0].mean() == pytest.approx(true, abs=0.02)


def test_intervals_of_noise_scale_and_correlation_cover():
    rng, runs, noise = np.random.default_rng(4), 1500, 1.2
    micro = micro_gradients(rng, at_angle(0.2, 25), 40, EQUAL, noise=noise, shared=0.5, runs=runs)
    gram, within = two_matrices(micro, EQUAL)
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), np.full(40, 32))
    scale = 32 * noise**2
    assert 0.92 <= ((found.noise_scale_low < scale) & (scale < found.noise_scale_high)).mean() <= 0.98
    hit = (found.noise_correlation_low < 0.5) & (found.noise_correlation_high > 0.5)
    assert 0.92 <= hit.mean() <= 0.98


def test_a_slow_drift_is_not_taken_for_noise():
    rng = np.random.default_rng(5)
    values = np.linspace(0, 100, 400)[:, None] + rng.normal(size=(400, 300))
    found = stats.series_mean(values)
    assert np.sqrt(found.variance).mean() == pytest.approx(1 / np.sqrt(400), rel=0.1)
    assert values.std() > 20  # what a plain standard error would have taken


def test_a_gradient_that_cannot_be_told_from_noise_has_no_angle_and_is_not_clamped():
    rng = np.random.default_rng(6)
    truth = at_angle(0.5, 25)
    truth[1] = 0.0
    micro = micro_gradients(rng, truth, 30, EQUAL, noise=1.0, shared=0.0, runs=400)
    gram, within = two_matrices(micro, EQUAL)
    found = stats.pooled(gram, stats.noise_part(gram, within, EQUAL), 32)
    assert found.square_resolved[:, 0].all()
    assert 0.01 <= found.square_resolved[:, 1].mean() <= 0.05  # one-sided 2.5 %
    gated = ~found.square_resolved[:, 1]
    assert np.isnan(found.cosine[gated]).all()
    assert np.isnan(found.high[gated]).all()
    assert np.isnan(found.noise_scale[gated, 1]).all()
    assert (found.square[:, 1] < 0).any()  # unbiased: half of them


def test_an_estimate_is_not_held_within_minus_one_and_one():
    true = np.array([[1.0, 1.02], [1.02, 1.0]]) + np.zeros((5, 2, 2))
    found = stats.pooled(true, np.zeros_like(true), 8)
    assert found.cosine[0] == pytest.approx(1.02)


def test_rows_that_were_not_measured_do_not_count_for_the_pairs_that_need_them():
    rng = np.random.default_rng(7)
    g = rng.normal(size=(20, 3, 9)) + 2
    gram = g @ g.transpose(0, 2, 1)
    holed = gram.copy()
    holed[4, 2, :] = holed[4, :, 2] = np.nan
    found = stats.pooled(holed, 0.01 * np.abs(holed), 8)
    whole = stats.pooled(gram, 0.01 * np.abs(gram), 8)
    assert found.rows.tolist() == [20, 19, 19]
    assert found.cosine[0] == whole.cosine[0]
    without = stats.pooled(np.delete(gram, 4, axis=0), 0.01 * np.abs(np.delete(gram, 4, axis=0)), 8)
    assert found.cosine[1] == without.cosine[1]
    assert found.low[2] == without.low[2]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows_have_no_interval(rows):
    gram = np.tile(np.eye(2), (rows, 1, 1))
    found = stats.pooled(gram, 0 * gram, 8)
    assert np.isnan([*found.cosine, *found.low, *found.noise_scale]).all()
    assert not found.square_resolved.any()


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(0, 99))
def test_scaling_a_task_changes_no_cosine(one, other, seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(10, 2, 6)) + np.array([[2.0], [1.0]])
    factor = np.array([one, other])
    gram = g @ g.transpose(0, 2, 1)
    scaled = gram * factor[:, None] * factor
    left, right = (stats.pooled(x, 0.1 * x * np.eye(2), 16) for x in (gram, scaled))
    for name in ("cosine", "low", "high", "noise_scale"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-9, atol=1e-12)


def test_the_ratio_of_sums_and_its_interval():
    rng = np.random.default_rng(8)
    below = 2 + rng.normal(size=(40, 1500))
    above = 0.6 * below + rng.normal(size=(40, 1500))
    found = stats.pooled_ratio(above, below)
    half = found.half()
    np.testing.assert_allclose(found.mean, above.sum(axis=0) / below.sum(axis=0))
    assert 0.92 <= (np.abs(found.mean - 0.6) < half).mean() <= 0.98


# ---- over seeds


@settings(deadline=None)
@given(samples, st.sampled_from([0.9, 0.95]))
def test_the_t_interval_is_scipys(d, level):
    mean, low, high = stats.t_interval(d, level)
    if d.std() > 1e-6:
        twin = scipy.stats.ttest_1samp(d, 0).confidence_interval(level)
        np.testing.assert_allclose([low, high], [twin.low, twin.high], rtol=1e-9, atol=1e-9)
    assert low <= mean <= high


@settings(deadline=None)
@given(samples, st.floats(-2, 2))
def test_p_values_are_scipys(d, value):
    found = stats.paired(d)
    if d.std() > 1e-6:
        for side, got in (("less", found.p_below(value)), ("greater", found.p_above(value))):
            assert got == pytest.approx(scipy.stats.ttest_1samp(d, value, alternative=side).pvalue, abs=1e-9)


@settings(deadline=None)
@given(samples, samples)
def test_welch_is_scipys(a, b):
    if min(a.std(), b.std()) > 1e-6:
        found, twin = stats.welch(a, b), scipy.stats.ttest_ind(a, b, equal_var=False)
        assert found.p_below(0) == pytest.approx(
            scipy.stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue, abs=1e-9
        )
        interval = twin.confidence_interval(0.95)
        np.testing.assert_allclose(np.ravel(found.interval()), [interval.low, interval.high], rtol=1e-8, atol=1e-8)


def test_a_missing_seed_is_left_out_and_one_seed_has_no_interval():
    found = stats.paired([[1.0, np.nan, 2.0, 4.0], [3.0, np.nan, np.nan, np.nan]])
    assert found.seeds.tolist() == [3, 1]
    assert found.interval()[0][0] == stats.t_interval([1.0, 2.0, 4.0])[1]
    assert np.isnan(found.interval()[0][1])
    assert np.isnan(stats.paired([np.nan, np.nan]).p_below(0))


def test_differences_without_any_spread():
    found = stats.paired([0.0, 0.0, 0.0])
    assert [*found.interval(), found.p_below(0), found.p_above(0)] == [0, 0, 1, 1]
    assert stats.paired([-1.0, -1.0]).p_below(0) == 0


def test_a_second_source_of_error_widens_the_interval():
    narrow = stats.paired([0.1, 0.2, 0.3, 0.15, 0.25])
    wide = stats.widened(narrow, 0.04, 30)
    assert wide.error == pytest.approx(np.sqrt(narrow.error**2 + 0.04))
    assert wide.interval()[0] < narrow.interval()[0]
    same = stats.widened(narrow, 0.0, 30)
    np.testing.assert_allclose(np.ravel(same.interval()), np.ravel(narrow.interval()))


def test_seeds_and_clusters_together_cover():
    """A difference with noise of seeds, and of clusters that all seeds are tested on."""
    rng, studies, seeds, clusters = np.random.default_rng(9), 3000, 5, 20
    cluster = rng.normal(size=(studies, 1, clusters)) * 0.5
    both = rng.normal(size=(studies, seeds, 1)) * 0.1 + cluster + rng.normal(size=(studies, seeds, clusters)) * 0.3
    total = both.sum(axis=-1, keepdims=True)
    without = ((total - both) / (clusters - 1)).mean(axis=1)
    plain = stats.paired(both.mean(axis=-1))
    whole = stats.widened(plain, stats.jackknife_variance(without), clusters - 1)
    assert 0.94 <= np.mean([abs(whole.effect) < whole.interval()[1] - whole.effect]) <= 0.98
    assert (
        np.mean([abs(plain.effect) < plain.interval()[1] - plain.effect]) < 0.85
    )  # as if the images were all there is


def test_the_jackknife_of_a_mean_is_its_squared_standard_error():
    rng = np.random.default_rng(10)
    values = rng.normal(size=25)
    without = [np.delete(values, k).mean() for k in range(25)]
    assert stats.jackknife_variance(without) == pytest.approx(values.var(ddof=1) / 25)
    assert np.isnan(stats.jackknife_variance([1.0]))
    assert np.isnan(stats.jackknife_variance([1.0, np.nan, 2.0]))


# ---- many tests


def naive_holm(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


probabilities = hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1))


@settings(deadline=None)
@given(probabilities)
def test_holm_is_its_definition(p):
    np.testing.assert_allclose(stats.holm(p), naive_holm(list(p)))
    np.testing.assert_array_equal(stats.holm(np.stack([p, p[::-1]]))[0], stats.holm(p))


def test_a_planned_comparison_without_a_p_value_counts_in_the_family():
    assert stats.holm([0.02, np.nan]).tolist()[0] == 0.04
    assert np.isnan(stats.holm([0.02, np.nan])[1])


@settings(deadline=None)
@given(probabilities, st.sampled_from([0.05, 0.1, 0.5]))
def test_benjamini_and_hochberg_is_scipys(p, rate):
    twin = scipy.stats.false_discovery_control(p)
    clear = np.abs(twin - rate) > 1e-9
    np.testing.assert_array_equal(stats.benjamini_hochberg(p, rate)[clear], (twin <= rate)[clear])


def test_benjamini_and_hochberg_by_hand():
    p = np.array([0.001, 0.02, 0.03, 0.5, np.nan])
    assert stats.benjamini_hochberg(p, 0.05).tolist() == [True, True, True, False, False]
    assert stats.benjamini_hochberg([0.03, 0.04, 0.9], 0.05).tolist() == [False, False, False]
    assert stats.benjamini_hochberg([], 0.05).tolist() == []


@pytest.mark.parametrize("count", [6, 8, 10])
def test_sign_flips_are_scipys(count):
    d = np.random.default_rng(count).normal(size=count) + 0.5
    twin = scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", alternative="two-sided")
    assert stats.sign_flip(d) == pytest.approx(twin.pvalue)


def test_sign_flips_of_few_and_of_many():
    assert np.isnan(stats.sign_flip(np.ones(5)))
    assert stats.sign_flip(np.ones(6)) == pytest.approx(2 / 2**6)
    assert stats.sign_flip(np.random.default_rng(0).normal(size=40) + 1) < 0.001
    assert stats.sign_flip(np.tile([1.0, -1.0], 10)) == 1


def test_skewed_differences_are_told():
    rng = np.random.default_rng(11)
    normal, skewed = rng.normal(size=(4000, 8)), rng.lognormal(0, 1.2, size=(4000, 8))
    assert stats.skewed(normal).mean() < 0.06
    assert stats.skewed(skewed).mean() > 0.4
    assert not stats.skewed(skewed[:, :3]).any()
    twin = scipy.stats.skew(skewed[0])
    assert stats.skewed(skewed[0]) == (abs(twin) > 1.96 * np.sqrt(6 * 6 / (9 * 11)))


# ---- ratios over seeds


def fieller_1954(above, below, level=0.95):
    """The roots as the paper writes them, of means m1 / m2 with variances v11, v22 and covariance v12."""
    n = len(above)
    (v11, v12), (_, v22) = np.cov(above, below) / n
    m1, m2 = np.mean(above), np.mean(below)
    t = scipy.stats.t.ppf(0.5 + level / 2, n - 1)
    g = t**2 * v22 / m2**2
    root = t / m2 * np.sqrt(v11 - 2 * m1 / m2 * v12 + (m1 / m2) ** 2 * v22 - g * (v11 - v12**2 / v22))
    return (m1 / m2 - g * v12 / v22 - root) / (1 - g), (m1 / m2 - g * v12 / v22 + root) / (1 - g)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_a_ratio_of_means_has_fiellers_interval_and_the_test_that_it_inverts(seeds):
    rng = np.random.default_rng(seeds)
    below = 10 + rng.normal(size=seeds)
    above = 0.4 * below + rng.normal(size=seeds)
    found = stats.ratio_of_means(above, below)
    np.testing.assert_allclose(np.ravel(found.interval(0.9)), fieller_1954(above, below, 0.9))
    for value in (*np.ravel(found.interval(0.9)), 0.0, 0.7):
        twin = scipy.stats.ttest_1samp(above - value * below, 0, alternative="less").pvalue
        assert found.p_below(value) == pytest.approx(twin, abs=1e-12)
        assert found.p_above(value) == pytest.approx(1 - twin, abs=1e-12)
    assert found.p_below(found.interval(0.9)[1]) == pytest.approx(0.05)


@pytest.mark.parametrize("resolved", [1.0, 2.0, 5.0], ids=lambda r: f"divisor={r}sd")
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_fiellers_interval_covers_where_a_divisor_is_near_zero(seeds, resolved):
    rng = np.random.default_rng(12)
    below = resolved + rng.normal(size=(20_000, seeds))
    above = 0.5 * below + 0.5 * rng.normal(size=(20_000, seeds))
    found = stats.ratio_of_means(above, below)
    low, high = found.interval()
    bounded = np.isfinite(low)
    np.testing.assert_array_equal(bounded, np.isfinite(high))
    assert 0.945 <= ((low <= 0.5) & (high >= 0.5)).mean() <= 0.98 + 0.02 * (not bounded.all())
    assert (found.p_below(0.5) <= 0.025).mean() == pytest.approx(0.025, abs=0.004)
    assert (found.p_above(0.5) <= 0.025).mean() == pytest.approx(0.025, abs=0.004)


def test_a_divisor_that_cannot_be_told_from_zero_leaves_the_interval_unbounded():
    found = stats.ratio_of_means([1.0, 1.1, 0.9], [1.0, -1.0, 0.3])
    assert np.ravel(found.interval()).tolist() == [-np.inf, np.inf]
    assert np.isfinite(found.effect)
    narrow = stats.ratio_of_means([1.0, 1.1, 0.9], [1.0, 0.9, 1.2])
    assert np.isfinite(narrow.interval()).all()
    assert np.isnan(stats.ratio_of_means([1.0, 2.0], [1.0, -1.0]).effect)  # nothing to divide by
    assert np.isnan(stats.ratio_of_means([1.0], [2.0]).interval()).all()
    assert np.isnan(stats.ratio_of_means([np.nan], [2.0]).effect)


@settings(deadline=None)
@given(samples, st.floats(0.5, 2))
def test_with_a_divisor_without_spread_it_is_students_t(d, divisor):
    found, twin = stats.ratio_of_means(d * divisor, np.full_like(d, divisor)), stats.paired(d)
    np.testing.assert_allclose(np.ravel(found.interval()), np.ravel(twin.interval()), rtol=1e-9, atol=1e-9)


def test_a_seed_that_is_missing_in_either_is_left_out():
    found = stats.ratio_of_means([1.0, 2.0, np.nan, 4.0, 1.5], [2.0, np.nan, 3.0, 5.0, 2.5])
    twin = stats.ratio_of_means([1.0, 4.0, 1.5], [2.0, 5.0, 2.5])
    assert (found.seeds, found.effect, found.error, found.covariance) == (
        3,
        twin.effect,
        pytest.approx(twin.error),
        pytest.approx(twin.covariance),
    )
    one = stats.difference_of_ratios([1.0, 2.0, np.nan, 2.0], [2.0, 3.0, 1.0, 2.5], [1.0] * 4, [2.0, 2.5, 1.0, 2.0])
    other = stats.difference_of_ratios([1.0, 2.0, 2.0], [2.0, 3.0, 2.5], [1.0] * 3, [2.0, 2.5, 2.0])
    assert one.effect == pytest.approx(other.effect)


def ratios_of_two(rng, studies, seeds, resolved, arm, base):
    """Numerators and divisors of an arm and a baseline: a divisor is ``resolved`` of its standard errors above 0."""
    found = []
    for ratio in (arm, base):
        own = np.exp(0.2 * rng.normal(size=(studies, seeds)))
        found += [
            ratio * own + 0.05 * rng.normal(size=(studies, seeds)),
            own + rng.normal(size=(studies, seeds)) / resolved,
        ]
    return found


@pytest.mark.parametrize("resolved", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_a_difference_of_ratios_errs_as_often_as_it_says(seeds, resolved):
    rng = np.random.default_rng(13)
    for arm in (0.5, 0.2):
        found = stats.difference_of_ratios(*ratios_of_two(rng, 20_000, seeds, resolved, arm, 0.5))
        assert (found.p_below(arm - 0.5) <= 0.025).mean() <= 0.03
        assert (found.p_above(arm - 0.5) <= 0.025).mean() <= 0.035


def test_a_difference_of_ratios_is_that_of_the_means_and_turns_with_the_sides():
    arm, arm_own, base, base_own = ratios_of_two(np.random.default_rng(14), 50, 5, 6.0, 0.2, 0.5)
    found, back = (
        stats.difference_of_ratios(*sides) for sides in ((arm, arm_own, base, base_own), (base, base_own, arm, arm_own))
    )
    by_hand = arm.mean(axis=1) / arm_own.mean(axis=1) - base.mean(axis=1) / base_own.mean(axis=1)
    np.testing.assert_allclose(found.effect, by_hand)
    np.testing.assert_allclose(back.interval()[0], -found.interval()[1])
    parts = stats.ratio_parts(arm, arm_own) - stats.ratio_parts(base, base_own)
    np.testing.assert_allclose(parts.mean(axis=1), found.effect)
    same = stats.difference_of_ratios(arm, base_own, base, base_own)
    one = stats.ratio_of_means(arm - base, base_own)  # one divisor: Fieller's own case
    np.testing.assert_allclose(np.ravel(same.interval()), np.ravel(one.interval()))
