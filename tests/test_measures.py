import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradprobe import measures

vectors = arrays(
    np.float64,
    st.tuples(st.integers(2, 5), st.integers(1, 6)),
    elements=st.floats(-10, 10, allow_nan=False, width=32),
)
calm = settings(deadline=None)


def gram_of(gradients):
    return gradients @ gradients.T


@calm
@given(vectors)
def test_norm_and_cosine_are_those_of_the_vectors(gradients):
    gram = gram_of(gradients)
    expected = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(measures.norm(gram), expected, rtol=1e-12)
    for i, g in enumerate(gradients):
        for j, h in enumerate(gradients):
            value = measures.cosine(gram)[i, j]
            if not g.any() or not h.any():
                assert np.isnan(value)
            else:
                assert value == pytest.approx(g @ h / np.linalg.norm(g) / np.linalg.norm(h), abs=1e-9)


@calm
@given(vectors, st.floats(1e-3, 1e3))
def test_scaling_a_task_changes_no_angle(gradients, factor):
    scaled = gradients.copy()
    scaled[0] *= factor
    np.testing.assert_allclose(
        measures.cosine(gram_of(scaled)), measures.cosine(gram_of(gradients)), atol=1e-9, equal_nan=True
    )


@calm
@given(vectors)
def test_pairs_are_the_upper_triangle_in_order(gradients):
    gram = gram_of(gradients)
    names = [str(i) for i in range(len(gradients))]
    full, flat = measures.cosine(gram), measures.pair_cosine(gram)
    for (a, b), value in zip(measures.pairs(names), flat, strict=True):
        np.testing.assert_equal(value, full[int(a), int(b)])


@calm
@given(vectors)
def test_the_gramian_comes_back_from_norms_and_cosines(gradients):
    gram = gram_of(gradients)
    back = measures.from_norms(measures.norm(gram), measures.pair_cosine(gram))
    np.testing.assert_allclose(back, gram, rtol=1e-9, atol=1e-9)


def test_a_missing_task_stays_missing():
    gram = np.array([[4.0, np.nan], [np.nan, np.nan]])
    assert measures.norm(gram)[0] == 2
    assert np.isnan(measures.norm(gram)[1])
    assert np.isnan(measures.pair_cosine(gram)).all()
    assert np.isnan(measures.from_norms(measures.norm(gram), measures.pair_cosine(gram))[0, 1])


def test_an_effect_depends_on_the_weights_and_cosine_does_not():
    gram = np.array([[4.0, -2.0], [-2.0, 9.0]])
    assert measures.effect(gram, [1, 1])[0, 1] == -0.5
    assert measures.effect(gram, [1, 4])[0, 1] == -2.0  # task 0 is driven backwards
    assert measures.progress(gram, [1, 4])[0] == -4.0
    assert np.isnan(measures.effect(gram, [0, 1])[0, 1])  # no progress of its own to compare with


def test_dominance_is_a_share_of_squared_weighted_norms():
    gram = np.diag([1.0, 4.0])
    np.testing.assert_allclose(measures.dominance(gram, [1, 1]), [0.2, 0.8])
    np.testing.assert_allclose(measures.dominance(gram, [1, 0]), [1, 0])
    assert np.isnan(measures.dominance(np.zeros((2, 2)), [1, 1])).all()


def test_magnitude_similarity_is_one_for_equal_lengths_only():
    gram = np.diag([1.0, 1.0, 9.0])
    similarity = measures.magnitude_similarity(gram)
    assert similarity[0, 1] == 1
    assert similarity[0, 2] == pytest.approx(0.6)


def test_over_layers_is_the_angle_of_the_joined_vectors():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(3, 2, 5))  # three layers of five parameters
    gram = g @ g.transpose(0, 2, 1)
    norms, cosines = measures.over_layers(gram, np.ones((3, 2), bool))
    joined = g.transpose(1, 0, 2).reshape(2, -1)
    np.testing.assert_allclose(norms, np.linalg.norm(joined, axis=1))
    np.testing.assert_allclose(cosines, [joined[0] @ joined[1] / np.prod(np.linalg.norm(joined, axis=1))])


def test_over_layers_takes_a_pair_only_where_both_reach():
    gram = np.array([[[1.0, 1.0], [1.0, 1.0]], [[9.0, np.nan], [np.nan, np.nan]]])
    norms, cosines = measures.over_layers(gram, [[True, True], [True, False]])
    np.testing.assert_allclose(norms, [np.sqrt(10), 1])
    np.testing.assert_allclose(cosines, [1.0])


def test_over_layers_is_missing_where_a_reached_layer_is():
    gram = np.array([np.eye(2), np.full((2, 2), np.nan)])
    norms, cosines = measures.over_layers(gram, np.ones((2, 2), bool))
    assert np.isnan(norms).all()
    assert np.isnan(cosines).all()


def test_over_no_layers_is_missing_and_not_zero():
    norms, cosines = measures.over_layers(np.zeros((4, 0, 2, 2)), np.zeros((0, 2), bool))
    assert norms.shape == (4, 2)
    assert np.isnan(norms).all()
    assert cosines.shape == (4, 1)
    assert np.isnan(cosines).all()


def test_conflict_is_a_sign_and_knows_what_it_does_not_know():
    np.testing.assert_equal(measures.conflict([-1e-9, 0.0, 1.0, np.nan]), [1, 0, 0, np.nan])
