"""The report as data and as HTML: what is drawn is what was recorded, whatever is missing, large or hostile."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_factory import HOSTILE, answer, make_comparison, make_study
from run_factory import make_header

from gradprobe.cli.report import parse_targets
from gradprobe.errors import MissingExtraError, RunFileError, UsageError
from gradprobe.foreign import LONGEST, clean
from gradprobe.messages import LANGUAGES, Language, Message
from gradprobe.report import (
    bins,
    cosine_map,
    course,
    dots,
    forest,
    ledger_bars,
    lines,
    page,
    questions,
    theme,
    validity,
)
from gradprobe.report.chart import Chart, Notice, NumberTable, Panel, distinct, inert, numbers
from gradprobe.report.context import Context
from gradprobe.report.page import SECTIONS, build, write
from gradprobe.report.page import html as make_html
from gradprobe.report.study_data import ArmFiles, LedgerSums, RunData, gather
from gradprobe.report.theme import Styles
from gradprobe.rows import ProbeLoaderRow
from gradprobe.runfile import Run, RunWriter
from gradprobe.verdict import answers as verdicts
from gradprobe.verdict.answers import INTERFERENCE, KEYS, OUTCOME, ArmLevel, Comparison, Direct, verdict_key

PAGE = Language(page=True)
BIGGEST = 12_000_000
"""Bytes of a report at most, of which 4.9 million are plotly.js."""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), rows=60, layers=6, epochs=3)


@pytest.fixture(scope="module")
def study_data(study):
    return gather(study, "joint", ["single"], {"mAP50": 0.6})


@pytest.fixture(scope="module")
def context(study_data, study):
    comparison = make_comparison(study)
    styles = Styles([arm.name for arm in study_data.arms], study_data.baseline, study_data.controls)
    return Context(study_data, comparison, PAGE, styles)


def context_of(study, comparison, words):
    found = gather(study, "joint", ["single"], {"mAP50": 0.6})
    return Context(found, comparison, words, Styles([arm.name for arm in found.arms], found.baseline, found.controls))


def page_of(study, comparison=None, lang="en", **options):
    return make_html(comparison or make_comparison(study), study, lang, **options)


@pytest.fixture(scope="module")
def written(study):
    """The page of the study, for all who only read it."""
    return page_of(study)


def figures_in(text):
    (data,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)["figures"]


def panels(context):
    return [b for make in SECTIONS for b in make(context).blocks if isinstance(b, Panel)]


def notices(context):
    return [b.text for make in SECTIONS for b in make(context).blocks if isinstance(b, Notice)]


class Reader(html.parser.HTMLParser):
    """Every element with its attributes, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.stack.append(tag)

    def handle_endtag(self, tag):
        self.stack.append("")

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.texts.append(data)


# ---- words


def test_the_chinese_report_has_no_english_sentence_of_ours(study):
    text = page_of(study, lang="zh-TW")
    seen = " ".join(Reader(text).texts)
    for key, message in LANGUAGES["en"].items():
        longest = max(re.split(r"[{}]", message), key=len).strip()
        if len(longest) > 25 and longest not in LANGUAGES["zh-TW"][key]:
            assert longest not in seen, key
    assert 'lang="zh-Hant-TW"' in text
    assert "多任務學習" in seen
    assert "梯度" in seen


def test_every_verdict_has_a_name_and_a_marker_of_its_own():
    known = {getattr(verdicts, name) for name in ("UNDEFINED", "NOT_APPLICABLE", "NO_VERDICT")} | set(
        verdicts.BY_RULE[1:]
    )
    assert known == set(KEYS)
    for verdict in known:
        assert forest.LOOKS[verdict_key(verdict)]
    telling = ("reduced", "reduced_uncertain", "equivalent", "not_reduced", "increased", "inconclusive", "undefined")
    markers = [forest.LOOKS[key][1] for key in telling]
    assert len(set(markers)) == len(markers)  # nothing hangs on colour alone


# ---- small functions against naive twins


@given(st.lists(st.floats(-5, 5, width=16) | st.just(float("nan")), min_size=1, max_size=40), st.integers(1, 9))
def test_bins_hold_the_median_of_their_rows(values, count):
    rows = np.array(values)
    steps = 3 * np.arange(len(rows))
    borders = bins.edges(0, int(steps[-1]), len(rows), count)
    place = bins.places(steps, borders)
    found = bins.medians(rows, place, len(borders) - 1)
    for b in range(len(borders) - 1):
        mine = [v for v, s in zip(rows, steps, strict=True) if borders[b] <= s < borders[b + 1] and np.isfinite(v)]
        np.testing.assert_allclose(found[b], np.median(mine) if mine else np.nan, rtol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=30), st.floats(0, 1))
def test_a_level_is_reached_when_the_running_median_is_there(values, level):
    found = bins.steps_to_reach(np.array([values]), np.arange(len(values)) * 10.0, level)[0]
    for i in range(len(values)):
        if np.median(values[max(0, i - bins.WINDOW + 1) : i + 1]) <= level:
            assert found == 10 * i
            return
    assert np.isnan(found)


@given(st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=4))
def test_every_seed_of_the_baseline_reaches_the_level_that_it_sets(seeds):
    values = np.array(seeds)
    assert np.isfinite(bins.steps_to_reach(values, np.arange(8.0), bins.final_level(values))).all()


def test_upwards_is_downwards_upside_down():
    values = np.array([[0.1, 0.4, 0.3, 0.8, 0.9, 0.95]])
    steps = np.arange(6.0)
    np.testing.assert_array_equal(
        bins.steps_to_reach(values, steps, 0.35, upwards=True), bins.steps_to_reach(-values, steps, -0.35)
    )


@given(st.text(max_size=200))
def test_clean_names_are_one_line_without_anything_that_acts(text):
    shown = clean(text)
    assert len(shown) <= LONGEST
    assert not set(shown) & set("\n\r\t\x00\u202e\u2066\u2028")
    shown.encode("utf-8")


def test_distinct_names_are_distinct_even_if_one_is_called_like_a_second_one():
    assert len(set(distinct(["a", "a (2)", "a", "a"]))) == 4


@pytest.mark.parametrize("text", ["mAP50", "mAP50=", "=0.5", "mAP50=high", "f1=0.5,f1=0.6", "f1=nan"])
def test_a_target_that_is_none_says_how_to_write_one(text):
    with pytest.raises(UsageError, match="--target"):
        parse_targets([text])


def test_numbers_of_json_are_short_and_what_is_unknown_is_null():
    assert numbers([1 / 3, np.nan, np.inf, np.float32(2), [0.1 + 0.2]]) == [0.3333, None, None, 2, [0.3]]


# ---- what is drawn is what was recorded


def test_losses_are_the_medians_of_the_rows_in_each_bin(study, study_data, context):
    series = context.series("loss", 0)
    assert [one.arm for one in series] == ["joint", "gradnorm", "single"]
    for one, arm in zip(series, study, strict=True):
        for seed, path in enumerate(arm.files):
            with Run(path) as run:
                steps, loss = run["step"], run["loss"][:, 0]
            for b, (low, high) in enumerate(zip(study_data.borders, study_data.borders[1:], strict=False)):
                mine = loss[(steps >= low) & (steps < high)]
                np.testing.assert_allclose(one.values[seed, b], np.median(mine) if len(mine) else np.nan, rtol=1e-6)


def test_bands_span_the_seeds(context):
    (one, *_) = context.series("loss", 0)
    figure = lines.draw([one], context.styles, "x", "y")
    edge, line = figure["data"]
    low, high = np.nanmin(one.values, axis=0), np.nanmax(one.values, axis=0)
    known = np.isfinite(low)
    assert edge["y"] == numbers([*high[known], *low[known][::-1]])
    assert line["y"] == numbers(np.nanmean(one.values, axis=0)[known])


def test_ticks_between_powers_of_ten_are_written_out(context):
    one = lines.Series("joint", np.arange(3.0), np.array([[0.01, 0.3, 1.0]]))
    y = lines.draw([one], context.styles, "x", "y")["layout"]["yaxis"]
    assert (y["type"], y["dtick"], y["tickformat"]) == ("log", "D2", "~g")


def test_the_heatmap_is_the_median_of_bins_and_seeds(study, study_data):
    arm = study_data.arms[1]
    per_seed = []
    for path in study[1].files:
        with Run(path) as run:
            place = bins.places(run["step"], study_data.heat_borders)
            cosine = run["cosine"][:, :, 0]
            per_seed.append(
                [[np.median(cosine[place == b, layer]) for b in range(len(study_data.steps))] for layer in range(6)]
            )
    np.testing.assert_allclose(arm.heat[0], np.median(per_seed, axis=0), atol=1e-6)
    figure = cosine_map.draw(arm.layers, arm.heat[0], study_data.steps, PAGE)
    assert figure["data"][0]["z"] == numbers(arm.heat[0], 3)
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (-1, 1)
    assert figure["layout"]["yaxis"]["autorange"] == "reversed"  # the first layer on top


def test_a_forest_row_shows_both_intervals_the_effect_the_margin_and_every_seed():
    one = answer(INTERFERENCE, "gradnorm", "cls>det", [-0.4, -0.42, -0.38, -0.41, -0.39])
    figure = forest.draw([forest.answer_row(one, PAGE)], PAGE, "x")
    thin, thick, mark, seeds = figure["data"]
    assert thin["x"] == numbers([one.low95, one.high95])
    assert thick["x"] == numbers([one.low90, one.high90])
    assert thick["line"]["width"] > thin["line"]["width"]
    assert mark["x"] == numbers([one.effect])
    assert sorted(seeds["x"]) == pytest.approx([-0.42, -0.41, -0.4, -0.39, -0.38])
    (band,) = [s for s in figure["layout"]["shapes"] if s["type"] == "rect"]
    assert (band["x0"], band["x1"]) == (-0.1, 0.1)
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < one.low95
    assert high > 0.1
    assert [a["text"] for a in figure["layout"]["annotations"]][1] == "REDUCED"


def test_a_level_without_a_mean_shows_the_seeds_that_have_a_number():
    level = ArmLevel(
        INTERFERENCE, "joint", "cls>det", Message("quantity.dominance"), *[math.nan] * 3, [0.3, math.nan], [0, 1]
    )
    figure = forest.draw([forest.level_row(level, Styles(["joint"], "joint", []), PAGE)], PAGE, "x")
    (seeds,) = figure["data"]
    assert seeds["x"] == [0.3]


def test_seeds_of_an_outcome_lie_on_the_side_of_its_effect():
    """Metrics fall where the gap to single tasks, which is the effect, grows."""
    one = answer(OUTCOME, "gradnorm", "mAP50", [0.1, 0.12, 0.11], margin=0.02)
    assert one.arm_values[0] < one.baseline_values[0]
    seeds = forest.draw([forest.answer_row(one, PAGE)], PAGE, "x")["data"][-1]
    assert min(seeds["x"]) == pytest.approx(0.1)


def test_an_answer_without_numbers_has_a_row_and_no_interval(context):
    dual = next(a for a in context.comparison.answers if a.arm == "dual")
    figure = forest.draw([forest.answer_row(dual, PAGE)], PAGE, "x")
    assert [a["text"] for a in figure["layout"]["annotations"]] == ["dual\u00a0· cls\u00a0→\u00a0det", "NOT APPLICABLE"]
    assert figure["data"] == [{"type": "scatter", "x": [None], "y": [None], "hoverinfo": "skip"}]


def test_targets_are_drawn_and_counted_per_seed(context, study_data):
    section = course.metrics(context)
    final = next(b for b in section.blocks if isinstance(b, Panel))
    chart = final.charts[0]
    assert chart.title == "mAP50, val, target 0.6"
    assert chart.figure["layout"]["shapes"][0]["x0"] == 0.6
    last = [run.epochs["mAP50"][-1, 1] for run in study_data.arms[0].runs]
    row = next(row for row in final.table.rows if row[0] == "mAP50" and row[2] == "joint")
    assert row[-1] == f"{sum(v >= 0.6 for v in last)} of 3"


def test_a_target_without_its_metric_is_said(study):
    text = page_of(study, targets={"mAP75": 0.5})
    assert "No file holds the metrics mAP75" in text


def test_metrics_of_the_test_split_are_taken_only_where_every_run_has_them(study_data):
    assert not course.on_test(study_data, "mAP50")
    assert course.final(study_data.runs[0], "mAP50", False) == study_data.runs[0].epochs["mAP50"][-1, 1]


def test_seeds_that_do_not_reach_a_level_are_shown_as_such():
    styles = Styles(["a"], "a")
    figure = dots.draw([dots.Dots("a", np.array([10.0, np.nan]), 99.0)], styles, PAGE, "step")
    missed = figure["data"][-1]
    assert missed["x"] == [99]
    assert missed["marker"]["symbol"] == "triangle-right-open"
    assert "1 not reached" in missed["hovertemplate"]


def made_ledger(seed):
    rng = np.random.default_rng(seed)
    return LedgerSums(
        ("det", "cls", "weight decay", "earlier momentum"),
        rng.normal(size=(2, 4)), rng.normal(size=2), rng.normal(size=2), 10, 12,
    )  # fmt: skip


def with_ledger(run, ledger):
    return RunData(**(vars(run) | {"ledger": ledger}))


def test_ledger_bars_are_means_over_seeds_and_leave_what_is_missing_as_residual(context, study_data):
    ledgers = [made_ledger(seed) for seed in range(3)]
    arm = study_data.arms[0]
    runs = [with_ledger(run, one) for run, one in zip(arm.runs, ledgers, strict=True)]
    changed = type(study_data)(
        **(vars(study_data) | {"arms": [type(arm)(**(vars(arm) | {"runs": runs})), *study_data.arms[1:]]})
    )
    section = ledger_bars.section(Context(changed, context.comparison, context.words, context.styles))
    panel, notice = section.blocks
    bars = panel.charts[1].figure["data"]
    assert [bar["name"] for bar in bars] == [
        "det", "cls", "weight decay", "earlier momentum", "private layers", "measured change",
    ]  # fmt: skip
    assert panel.charts[1].figure["layout"]["barmode"] == "relative"
    for source in range(4):
        expected = np.mean([one.term[1, source] for one in ledgers])
        assert bars[source]["x"] == numbers([expected])
    residual = np.mean([one.term[1].sum() + one.head[1] - one.change[1] for one in ledgers])
    assert panel.table.rows[1][-2] == PAGE.signed(residual)
    assert "gradnorm" in notice.text


def test_figures_are_valid_for_plotly(context):
    go = pytest.importorskip("plotly.graph_objects")

    def painted(value):
        if isinstance(value, dict):
            return {k: painted(v) for k, v in value.items()}
        if isinstance(value, list):
            return [painted(v) for v in value]
        if isinstance(value, str) and value.startswith("@"):
            return theme.LIGHT[value[1:].split("/")[0]]
        return value

    charts = [chart for panel in panels(context) for chart in panel.charts]
    assert len(charts) > 15
    for chart in charts:
        go.Figure(painted(chart.figure))  # an unknown property, or a value of the wrong kind, raises


def test_every_colour_of_a_figure_is_in_both_palettes(context):
    found = set(re.findall(r'"@(\w+)', json.dumps([c.figure for p in panels(context) for c in p.charts])))
    assert len(found) > 10
    assert found <= set(theme.LIGHT)
    assert set(theme.LIGHT) == set(theme.DARK)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_has_a_contrast_of_four_and_a_half_and_marks_of_three(palette):
    for ground in ("page", "surface", "raised"):
        for text in ("ink", "soft", "link"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    for verdict in ("reduced", "increased", "same", "open", "none"):  # their names are text
        assert contrast(palette[verdict], palette["surface"]) >= 4.5, verdict
        assert contrast(palette[verdict], palette["page"]) >= 4.5, verdict
    for mark in ("baseline", *(f"series{i}" for i in range(theme.SERIES)), "minus", "plus"):
        assert contrast(palette[mark], palette["surface"]) >= 3, mark


def test_no_two_of_nine_arms_look_alike_and_controls_are_dashed():
    arms = ["joint", *"abcdefgh", "single"]
    styles = Styles(arms, "joint", ["single"])
    assert len({(styles.colour(a), styles.dash(a)) for a in arms}) == len(arms)
    assert styles.dash("single") != "solid"
    assert styles.dash("joint") == "solid"


def test_corrected_cosines_are_ratios_of_sums_over_rows_and_seeds():
    rng = np.random.default_rng(0)
    true = [rng.normal(size=(20, 2, 3, 3)) for _ in range(2)]
    for gram in true:
        gram += np.swapaxes(gram, -1, -2) + 6 * np.eye(3)
    place = np.repeat(np.arange(4), 5)
    have, want = ["a|b", "a|c", "b|c"], ["b|c", "x|y"]
    runs = [
        bins.RunCosines(names, np.zeros((2, 2, 4), np.float32), bins.pair_sums(gram, have, want, place, 4))
        for names, gram in zip((["p", "q"], ["q", "p"]), true, strict=True)
    ]
    layers, cosine, corrected = bins.heat_of_arm(runs)
    assert (layers, corrected) == (["p", "q"], True)
    for b in range(4):
        for place_in_first, place_in_second in ((0, 1), (1, 0)):
            total = true[0][place == b][:, place_in_first].sum(axis=0) + true[1][place == b][:, place_in_second].sum(
                axis=0
            )
            expected = total[1, 2] / np.sqrt(total[1, 1] * total[2, 2])
            assert cosine[0, place_in_first, b] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(cosine[1]).all()


def test_what_noise_hides_is_left_empty_and_never_cut_off():
    sums = np.array([[1.0, -1.0, 2.0], [1.0, 0.0, 2.0], [3.0, 1.0, 1.0], [1.0, 4.0, 4.0], [np.nan, 1.0, 1.0]])
    np.testing.assert_array_equal(bins.pooled_cosines(sums), np.float32([np.nan, np.nan, np.nan, 0.25, np.nan]))


def probed(path, rows, reach):
    """A run of three tasks on two layers; each row of the probe loader says the true Gramian of both layers together.

    An entry is spread evenly over the layers that both of its tasks reach; noise of 9 is on every square.
    """
    header = make_header(2, ("a", "b", "c"), reach=np.array(reach, dtype=bool))
    writer = RunWriter(path)
    writer.start(header)
    there = header.reach[:, :, None] & header.reach[:, None, :]
    for k, true in enumerate(rows):
        each = np.where(there, np.array(true, dtype=float) / np.maximum(there.sum(axis=0), 1), np.nan)
        noise = np.where(there, np.abs(each) * 0 + 9 * np.eye(3), np.nan)
        writer.write(ProbeLoaderRow(10 * k, 0, 0.1 * k, np.ones(3), each + noise, noise, 4, 32))
    writer.close()


def test_a_cosine_on_the_probe_loader_that_noise_hides_is_a_gap_and_never_cut_off(tmp_path):
    rows = [
        [[4, -1, 0], [-1, 1, 0.6], [0, 0.6, 1]],
        [[4, 3, 0], [3, 1, -1.2], [0, -1.2, 1]],  # of a|b beyond 1, of b|c below -1
        [[4, -1, 0], [-1, -0.5, 0.1], [0, 0.1, 1]],  # b's square is less than its noise
        [[np.nan] * 3] * 3,
        [[9, 0, 0], [0, 4, -2], [0, -2, 4]],
    ]
    probed(tmp_path / "run.h5", rows, [[1, 1, 0], [0, 1, 1]])
    (arm,) = gather([ArmFiles("joint", [tmp_path / "run.h5"], [0])]).arms
    found = arm.runs[0].probe
    assert found[:, 0].tolist() == [0, 10, 20, 30, 40]
    # each pair over the layer that both reach: a|b on the first, b|c on the second, a|c on none
    half = [[-1 / np.sqrt(4 * 0.5), 0.6 / np.sqrt(0.5)], [0, -2 / np.sqrt(2 * 4)]]
    gap = np.nan
    np.testing.assert_allclose(
        found[:, 1:],
        [[half[0][0], gap, half[0][1]], [gap] * 3, [gap] * 3, [gap] * 3, [half[1][0], gap, half[1][1]]],
        rtol=1e-3,
        atol=1e-5,
    )


def test_one_seed_without_its_noise_leaves_the_whole_arm_uncorrected():
    naive = np.full((1, 1, 2), 0.5, np.float32)
    runs = [bins.RunCosines(["a"], naive, np.ones((1, 1, 2, 3))), bins.RunCosines(["a"], naive / 5, None)]
    _, cosine, corrected = bins.heat_of_arm(runs)
    assert not corrected
    np.testing.assert_allclose(cosine, 0.3)


# ---- what is missing, large, or alone


def test_what_was_not_recorded_is_said_instead_of_drawn(context):
    said = " ".join(notices(context))
    for words in ("no loss ledger", "No measurement on a probe loader"):
        assert words in said


def test_the_magnitude_similarity_stands_beside_the_direct_effect(study):
    direct = Direct(-0.2, -0.3, -0.1, [0.4], [0.2], Message("direct.none", task="det"))
    answers = [replace(a, direct=direct) if a.subject == "cls>det" else a for a in make_comparison(study).answers]
    comparison = make_comparison(study, answers=answers)
    comparison.similarities[1] = replace(comparison.similarities[1], mean=math.nan, low95=math.nan, high95=math.nan)
    for lang in LANGUAGES:
        words = Language(lang, page=True)
        blocks = questions.evidence(context_of(study, comparison, words)).blocks
        tables = [block for block in blocks if isinstance(block, NumberTable)]
        assert [table.caption for table in tables] == [words("direct.title"), words("similarity.title")]
        assert tables[1].columns == words.columns("arm", "subject", "mean", "ci95")
        assert tables[1].rows[0] == ["joint", words.subject("det|cls"), "0.60", words.span(0.5, 0.7)]
        assert tables[1].rows[1][2:] == ["–", "–"]
    none = questions.evidence(context_of(study, make_comparison(study, similarities=()), PAGE)).blocks
    assert not [block for block in none if isinstance(block, NumberTable)]


def test_every_chart_says_in_words_what_it_shows_and_every_panel_has_its_table(context):
    for panel in panels(context):
        assert panel.table.rows, panel.title
        assert all(len(row) == len(panel.table.columns) for row in panel.table.rows), panel.title
        for chart in panel.charts:
            assert isinstance(chart, Chart)
            assert len(chart.alt) > 30, chart.title
            assert "{" not in chart.alt


def test_every_table_is_as_wide_as_its_head(context):
    for section in (make(context) for make in SECTIONS):
        for block in section.blocks:
            if isinstance(block, NumberTable):
                assert all(len(row) == len(block.columns) for row in block.rows), block.caption


def test_one_arm_without_a_baseline_is_described_and_gets_no_verdict(study):
    comparison = Comparison((), "", (), (), ("det", "cls"), refusals=[Message("refusal.no_controls")])
    text = page_of(study[1:2], comparison)
    seen = " ".join(Reader(text).texts)
    assert "No conclusion about interference." in seen
    assert "There is no run of one task alone" in seen
    assert "There is one arm" in seen
    assert len(figures_in(text)) > 5


def test_a_run_without_layers_epochs_or_rows_makes_a_report(tmp_path):
    no_layers = make_study(tmp_path, ["dual"], 1, rows=20, layers=0, epochs=0)
    assert "its tasks share no layer" in page_of(no_layers, Comparison((), "", (), (), ()))
    (tmp_path / "empty").mkdir()
    empty = make_study(tmp_path / "empty", ["joint"], 2, rows=0, layers=3, epochs=0)
    seen = " ".join(Reader(page_of(empty, Comparison((), "joint", (), (), ()))).texts)
    for said in ("No loss in these files", "No metrics in these files", "no cosine by layer was measured"):
        assert said in seen


def test_arms_with_other_layers_and_tasks_are_drawn_side_by_side(tmp_path):
    (tmp_path / "other").mkdir()
    two = make_study(tmp_path, ["joint"], 2, rows=20, layers=["a", "b", "c"])
    three = make_study(tmp_path / "other", ["split"], 1, rows=30, layers=["b"], tasks=("det", "cls", "depth"))
    study_data = gather([*two, *three], "joint")
    assert study_data.tasks == ("det", "cls", "depth")
    assert [arm.layers for arm in study_data.arms] == [("a", "b", "c"), ("b",)]
    assert np.isnan(study_data.arms[0].stack("loss", 2)).all()
    assert figures_in(page_of([*two, *three]))


@pytest.mark.parametrize("rows", [800, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_long_wide_study_stays_small(rows, tmp_path):
    arms = make_study(tmp_path, ["joint", "gradnorm"], 1, rows=rows, layers=40, epochs=300)
    names = ["joint", *(f"arm {i}" for i in range(11))]
    many = [ArmFiles(name, arms[i % 2].files, [0]) for i, name in enumerate(names)]
    text = page_of(many)
    assert len(text.encode()) < BIGGEST
    cells = sum(np.size(t["z"]) for f in figures_in(text) for t in f["data"] if t["type"] == "heatmap")
    assert 50_000 < cells <= 300_000
    assert max(len(t["x"]) for f in figures_in(text) for t in f["data"]) <= 2 * bins.BINS


@pytest.mark.parametrize("seeds", [dots.SEEDS + 1, pytest.param(150, marks=pytest.mark.slow)])
def test_many_seeds_are_drawn_as_some_of_them_and_counted_in_full(seeds, tmp_path):
    (one,) = make_study(tmp_path, ["joint"], 1, rows=6, layers=2)
    study_data = gather([ArmFiles("joint", [one.files[0]] * seeds, range(seeds))], "joint")
    comparison = Comparison((), "joint", (), (), ("det", "cls"))
    words = PAGE
    context = Context(study_data, comparison, words, Styles(["joint"], "joint"))
    assert len(study_data.runs) == seeds
    charts = [c for p in panels(context) for c in p.charts]
    assert max(len(t["x"]) for c in charts for t in c.figure["data"]) <= 2 * bins.BINS
    assert any(f"(n = {seeds})" in json.dumps(c.figure) for c in charts)


def test_more_arms_tasks_and_pairs_than_can_be_drawn_are_counted(tmp_path):
    (one,) = make_study(tmp_path, ["joint"], 1, rows=6, layers=2, tasks=[f"t{i}" for i in range(9)])
    many = [ArmFiles(f"arm {i}", one.files, one.seeds) for i in range(30)]
    text = page_of(many, Comparison((), "arm 3", (), (), ()))
    assert gather(many, "arm 3").left_out == {"arms": 6, "tasks": 3, "pairs": 33}
    for said in ("6 more arms", "3 more tasks", "33 more pairs"):
        assert said in text


def test_more_layers_than_rows_of_cells_are_put_together_and_named_as_spans():
    layers = tuple(f"layer{i}" for i in range(500))
    values = np.tile(np.arange(500, dtype=np.float32)[:, None], (1, 4))
    shown, cells = cosine_map.fold(layers, values)
    assert len(shown) == 100
    assert shown[0] == "layer0 … layer4"
    assert cells[0, 0] == 2


def test_limits_name_what_these_files_lack(context):
    found = validity.limits_here(context)
    assert {"naive", "no_ledger", "no_probe", "no_test"} <= set(found)
    assert not {"no_control", "one_arm", "few_seeds", "unfinished"} & set(found)


def test_the_limits_say_how_far_the_verdicts_reach(study):
    said = Message("scope.data", n=1)
    for words, text in ((PAGE, "All runs learned from 1 data set"), (Language("zh-TW", page=True), "1 個資料集")):
        section = validity.limits(context_of(study, make_comparison(study, scope=[said]), words))
        points = [point for block in section.blocks for point in block.paragraphs]
        assert sum(text in point for point in points) == 1


# ---- strangers' names


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    arms = make_study(folder, [HOSTILE[0], HOSTILE[1]], 3, rows=12, layers=list(HOSTILE), tasks=HOSTILE[2:4])
    said = {
        "warnings": [Message("plan.none", file=HOSTILE[0])],
        "refusals": [Message("refusal.nothing", arm=HOSTILE[1])],
    }
    comparison = make_comparison(arms, HOSTILE[0], **said, left_out_layers=[HOSTILE[3]])
    return page_of(arms, comparison, targets={HOSTILE[0]: 0.5})


def test_hostile_names_add_no_element_and_no_attribute_that_acts(hostile, written):
    mine, theirs = Reader(written), Reader(hostile)
    assert {tag for tag, _ in theirs.elements} <= {tag for tag, _ in mine.elements}
    assert sum(tag == "script" for tag, _ in theirs.elements) == 3
    for _, attributes in theirs.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
        assert attributes.get("href", "#").startswith("#")
    assert HOSTILE[0] in " ".join(theirs.texts)  # shown as it is, and inert


def test_figures_hold_no_markup_of_strangers(hostile):
    def texts(value, key=""):
        if isinstance(value, dict):
            for name, one in value.items():
                yield from texts(one, name)
        elif isinstance(value, list):
            for one in value:
                yield from texts(one, key)
        elif isinstance(value, str):
            yield key, value

    found = list(texts(figures_in(hostile)))
    assert any("&lt;img src=x" in text for _, text in found)
    for key, text in found:
        if key == "hovertemplate":
            assert "boom" not in text
            assert "evil" not in text
        else:
            assert "<" not in text, (key, text)


def test_text_is_made_inert_everywhere_but_in_our_own_templates():
    figure = {"data": [{"name": "<b>", "text": [["&"]], "hovertemplate": "<b>%{x}</b>"}]}
    assert inert(figure) == {"data": [{"name": "&lt;b&gt;", "text": [["&amp;"]], "hovertemplate": "<b>%{x}</b>"}]}


def test_the_policy_allows_two_scripts_and_no_address(written):
    (policy,) = [a["content"] for t, a in Reader(written).elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.split(" ", 1) for part in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert len(rules["script-src"].split()) == 2
    assert "unsafe" not in rules["script-src"]
    assert not re.search(r"https?:", policy)


# ---- the command


def command(*words):
    from typer.testing import CliRunner

    from gradprobe.cli.app import app

    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_the_command_writes_the_report_of_a_folder(study, tmp_path):
    out = tmp_path / "report.html"
    done = command(study[0].files[0].parent, "--out", out, "--target", "mAP50=0.6", "--lang", "zh-TW")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    seen = " ".join(Reader(out.read_text(encoding="utf-8")).texts)
    assert "mAP50，驗證集，目標 0.6" in seen
    assert {"joint", "gradnorm", "single"} <= set(re.findall(r"\w+", seen))


def test_arms_are_named_on_the_command_line(study, tmp_path):
    out = tmp_path / "report.html"
    files = study[1].files[0].parent / "1-*.h5"
    done = command("--arm", f"mine={files}", "--arm", f"base={files.with_name('0-*.h5')}", "--baseline", "base",
                   "--unpaired", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "base (baseline)" in out.read_text(encoding="utf-8")


def test_what_is_wrong_on_the_command_line_is_told_before_a_file_is_read(tmp_path):
    for words, said in (
        (("nowhere", "--lang", "fr"), "--lang fr"),
        (("nowhere", "--target", "mAP50"), "--target"),
        (("nowhere",), "nowhere"),
        ((), "no run files"),
    ):
        done = command(*words, "--out", tmp_path / "report.html")
        assert said in str(done.exception)
    assert not list(tmp_path.iterdir())


# ---- the file


def test_the_library_is_in_the_file_once(written):
    assert written.count("plotly.js v") == 1
    assert len(written.encode()) < 6_000_000


def test_the_same_study_gives_the_same_bytes(study, written):
    assert page_of(study) == written


def test_a_missing_extra_names_the_pip_line(study, monkeypatch):
    for module in ("jinja2", "plotly.offline"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'gradprobe\[report\]'"):
                page_of(study)


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFileError, match="--out"):
        write("x", tmp_path / "file" / "report.html")
    write("x", tmp_path / "new" / "report.html")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_headings_go_down_by_one_and_every_section_has_one(written):
    read = Reader(written)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    linked = {a["href"][1:] for t, a in read.elements if t == "a"}
    assert linked <= {a.get("id") for _, a in read.elements}


def test_a_long_headline_is_said_in_short_and_then_in_full(context):
    why = Message("reason.not_shared", arm="dual", tasks=["det", "cls"])
    for key, short in (
        ("no_gradient", "No gradient can interfere."),
        ("no_conclusion", "No conclusion about interference."),
    ):
        said = Message(f"headline.{key}", why=why)
        found = questions.headline(replace(context, comparison=replace(context.comparison, headline=[said])))
        assert found == (short, [PAGE.say(said)])


def test_the_top_says_all_of_interference_since_half_of_it_would_mislead(context):
    built = build(context.study, context.comparison, context.words)
    assert built.headline == "Interference: 1 × INCREASED, 1 × REDUCED, 1 × UNDEFINED and 1 × NOT APPLICABLE.".replace(
        " × ", "\u00a0×\u00a0"
    )
    assert built.answer[0] == (
        "gradnorm: interference against joint is REDUCED (cls → det), INCREASED (det → cls), UNDEFINED (a → b)."
    ).replace(" → ", "\u00a0→\u00a0")
    assert page.size([c.figure for p in panels(context) for c in p.charts]) < 1_000_000
