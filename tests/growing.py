"""Runs whose layers join after the start, made by hand: every row follows from its step."""

from __future__ import annotations

import numpy as np

from gradprobe import measures
from gradprobe.rows import Header, LedgerRow, ProbeLoaderRow, Row, UpdateRow

TASKS = ("a", "b")
LAYERS = ("trunk.0", "trunk.1", "late.0", "late.1", "late.2")
SIZE = np.array([30, 12, 50, 7, 9])


def header(layers=5, reach=None, **more):
    reach = np.ones((layers, 2), bool) if reach is None else reach
    return Header(TASKS, LAYERS[:layers], SIZE[:layers], reach, **more)


def gram(step, layers, lacking=()):
    """(L, T, T) of true gradients; the tasks have none on the layers that are lacking."""
    rng = np.random.default_rng([7, step])
    grads = rng.normal(size=(len(LAYERS), 2, 6))[:layers]
    found = grads @ grads.transpose(0, 2, 1)
    found[list(lacking)] = np.nan
    return found


def row(step, layers, among=None, lacking=(), **more):
    """A row of so many layers; ``among``: filled up with NaN, as if the others had been there from the start."""
    values = filled(gram(step, layers, lacking), among)
    rng = np.random.default_rng([8, step])
    noise = filled(0.1 * gram(step, layers, lacking), among) if step % 2 else None
    counts = ~np.isnan(np.diagonal(values, axis1=1, axis2=2))
    return Row(
        step,
        step // 10,
        step * 0.5,
        rng.random(2),
        np.ones(2),
        values,
        batch_size=8,
        gram_noise=noise,
        micro_batches=1 + step % 2,
        reach=counts,
        **more,
    )


def others(step, layers, among=None):
    """Rows of the other tables that have a layer axis."""
    rng = np.random.default_rng([9, step])
    parts = rng.normal(size=(len(LAYERS), 4, 6))[:layers]
    effect, term = rng.normal(size=(2, len(LAYERS), 2, 4))[:, :layers]
    whole, pair = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2))
    alone = np.random.default_rng([10, step]).normal(size=(len(LAYERS), 2))[:layers]
    return (
        UpdateRow(
            step,
            step // 10,
            step * 0.5,
            1.0,
            1.0,
            np.array([0.5, 0.5]),
            np.ones(2),
            1,
            0,
            0.0,
            0.0,
            1.0,
            filled(parts @ parts.transpose(0, 2, 1), among),
            filled(effect, among),
        ),
        LedgerRow(step, step // 10, step * 0.5, 0, filled(term, among), *whole, *pair, filled(alone, among)),
        ProbeLoaderRow(
            step,
            step // 10,
            step * 0.5,
            rng.random(2),
            filled(gram(step + 1000, layers), among),
            filled(0.1 * gram(step + 1000, layers), among),
            4,
            32,
        ),
    )


def filled(values, among):
    if among is None:
        return values
    wide = np.full((among, *values.shape[1:]), np.nan)
    wide[: len(values)] = values
    return wide


def start(writer, layers):
    writer.start(header(layers))


def put(writer, step, layers, among=None, *, tables=True, **more):
    writer.write(row(step, layers, among, **more))
    if tables:
        update, ledger, probed = others(step, layers, among)
        writer.write(update)
        writer.write(ledger)
        writer.write(probed)


def expected(counts, lacking=None):
    """Norms (n, L, T) and cosines (n, L, 1) of rows 0, 1, ... with so many layers, and both over all of a row's."""
    lacking = lacking or {}
    grams = np.stack([filled(gram(s, n, lacking.get(s, ())), len(LAYERS)) for s, n in enumerate(counts)])
    there = ~np.isnan(np.diagonal(grams, axis1=2, axis2=3))
    total = np.where(there[..., None] & there[..., None, :], grams, 0).sum(axis=1)
    return measures.norm(grams), measures.pair_cosine(grams), measures.norm(total), measures.pair_cosine(total)
