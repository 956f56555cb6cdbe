"""The six rules, one by one, and what they reach in simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradprobe.statistics import paired, t_interval
from gradprobe.verdict.answers import BY_RULE, EQUIVALENT, INCREASED, REDUCED, UNCERTAIN
from gradprobe.verdict.decision import decide

SPREAD = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])  # of five seeds about their mean


def of(effect, spread, margin=0.1):
    return int(decide(paired((effect + spread * SPREAD)[None]), margin).rule[0])


@pytest.mark.parametrize(
    ("rule", "effect", "spread"),
    [
        (1, -0.30, 0.1),  # all of the interval beyond the margin
        (2, 0.00, 0.05),
        (2, -0.05, 0.02),  # surely below 0, and surely by less than what matters
        (3, -0.15, 0.1),
        (4, 0.15, 0.1),
        (5, 0.10, 0.15),
        (6, -0.10, 0.2),
        (6, 0.00, 0.5),
    ],
)
def test_each_rule(rule, effect, spread):
    assert of(effect, spread) == rule


@settings(deadline=None, max_examples=300)
@given(hnp.arrays(np.float64, st.integers(3, 9), elements=st.floats(-1, 1)), st.floats(0.01, 0.5))
def test_one_comparison_is_decided_by_its_intervals_alone(d, margin):
    """Written again from the list of rules, without p-values."""
    if d.std() < 1e-6:
        return
    _, low95, high95 = t_interval(d)
    _, low90, high90 = t_interval(d, 0.90)
    if high95 < -margin:
        twin = 1
    elif -margin < low90 and high90 < margin:
        twin = 2
    elif high95 < 0:
        twin = 3
    elif low95 > 0:
        twin = 4
    elif low90 > -margin:
        twin = 5
    else:
        twin = 6
    clear = min(abs(x) for x in (high95 + margin, high95, low95, low90 + margin, high90 - margin)) > 1e-9
    assert not clear or decide(paired(d[None]), margin).rule[0] == twin


@settings(deadline=None)
@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-1, 1)), st.permutations(range(3)))
def test_the_order_of_comparisons_changes_nothing(d, order):
    whole = decide(paired(d))
    np.testing.assert_array_equal(decide(paired(d[list(order)])).rule, whole.rule[list(order)])


def test_more_comparisons_make_a_claim_harder_and_leave_the_interval_alone():
    d = -0.15 + 0.1 * SPREAD * 1.15
    alone, among = decide(paired(d[None])), decide(paired(np.stack([d] + [0.4 * SPREAD] * 9)))
    assert alone.rule[0] == 3
    assert among.rule[0] == 6
    assert among.high95[0] == alone.high95[0] < 0
    assert among.p_zero_holm[0] == pytest.approx(10 * alone.p_zero[0])


def test_more_comparisons_make_it_harder_to_be_called_equivalent_too():
    d = 0.04 + 0.05 * SPREAD
    alone, among = decide(paired(d[None])), decide(paired(np.stack([d] + [0.4 * SPREAD] * 9)))
    assert alone.rule[0] == 2
    assert among.rule[0] == 5  # that it did not fall by the margin still stands
    assert among.high90[0] == alone.high90[0] < 0.1
    below = alone.p_not_reduced[0]
    assert alone.p_equivalent[0] > 5 * below
    assert among.p_equivalent_holm[0] == pytest.approx(10 * alone.p_equivalent[0])
    assert among.p_not_reduced_holm[0] == pytest.approx(10 * below)
    far = decide(paired(np.stack([d + 0.01 * SPREAD] + [0.4 * SPREAD] * 99)))
    assert far.rule[0] == 6


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_fewer_than_three_seeds_have_no_verdict(seeds):
    d = np.full((1, 3), np.nan)
    d[0, :seeds] = -0.9 + 0.001 * np.arange(seeds)
    found = decide(paired(d))
    assert found.rule[0] == 0
    assert np.isnan(found.p_zero[0])


def test_a_comparison_without_a_number_has_no_verdict_and_still_counts():
    d = np.stack([-0.15 + 0.1 * SPREAD, np.full(5, np.nan)])
    found = decide(paired(d))
    assert found.rule.tolist()[1] == 0
    assert found.p_zero_holm[0] == pytest.approx(2 * found.p_zero[0])


def claims(found):
    """Per study, whether anything was called reduced or increased."""
    called = [BY_RULE.index(name) for name in (REDUCED, UNCERTAIN, INCREASED)]
    return np.isin(found.rule, called).any(axis=-1)


STUDIES = 20_000


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("sd", [0.02, 0.1, 1.0], ids=lambda sd: f"sd={sd}")
def test_under_the_null_a_difference_is_claimed_in_at_most_five_and_a_half_percent(seeds, sd):
    rng = np.random.default_rng(seeds)
    d = sd * rng.normal(size=(STUDIES, 1, seeds))
    assert claims(decide(paired(d))).mean() <= 0.055


def test_the_same_holds_for_a_whole_study_of_arms_and_pairs():
    """Three arms against one baseline, two pairs each: six comparisons that share the baseline's runs."""
    rng = np.random.default_rng(1)
    baseline = rng.normal(size=(STUDIES, 1, 2, 5))
    arms = rng.normal(size=(STUDIES, 3, 2, 5))
    d = (arms - baseline).reshape(STUDIES, 6, 5)
    assert claims(decide(paired(d))).mean() <= 0.055
    alone = np.stack([claims(decide(paired(d[:, [k]]))) for k in range(6)])
    assert alone.any(axis=0).mean() > 0.15  # what it would be without Holm


@pytest.mark.parametrize("sd", [0.06, 0.1, 0.5])
def test_an_effect_of_two_standard_deviations_is_found_with_five_seeds(sd):
    rng = np.random.default_rng(2)
    d = -2 * sd + sd * rng.normal(size=(STUDIES, 1, 5))
    found = decide(paired(d))
    reduced = np.isin(found.rule, [BY_RULE.index(REDUCED), BY_RULE.index(UNCERTAIN)])
    assert reduced.mean() >= 0.87
    assert (found.rule == BY_RULE.index(INCREASED)).mean() == 0


@pytest.mark.parametrize("effect", [-0.1, 0.1])
def test_of_twenty_differences_of_exactly_the_margin_one_is_called_equivalent_in_five_percent_of_studies(effect):
    rng = np.random.default_rng(3)
    found = decide(paired(effect + 0.02 * rng.normal(size=(STUDIES, 20, 5))))
    assert (found.rule == BY_RULE.index(EQUIVALENT)).any(axis=-1).mean() <= 0.055
    unadjusted = (found.low90 > -0.1) & (found.high90 < 0.1)
    assert unadjusted.any(axis=-1).mean() == pytest.approx(1 - 0.95**20, abs=0.01)
    if effect < 0:
        assert np.isin(found.rule, [2, 5]).any(axis=-1).mean() <= 0.055
