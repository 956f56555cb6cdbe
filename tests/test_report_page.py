"""The report in a browser: no error, no request, charts with data, hover, keys, contrast, two widths, dark, print."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_factory import HOSTILE, make_comparison, make_study

from gradprobe.messages import Message
from gradprobe.report.page import html, write
from gradprobe.report.theme import DARK, LIGHT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.timeout(900),  # a browser that shares two cores with many others
]

PHONE, DESKTOP = (360, 740), (1280, 900)
DRAWN = "html[data-drawn]"


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A report in English, one in Chinese, and one whose every name is hostile."""
    folder = tmp_path_factory.mktemp("reports")
    arms = make_study(folder, rows=40, layers=6, epochs=3)
    comparison = make_comparison(arms)
    (folder / "bad").mkdir()
    bad = make_study(folder / "bad", HOSTILE[:2], 3, rows=12, layers=list(HOSTILE), tasks=HOSTILE[2:4])
    warnings = [Message("plan.none", file=name) for name in HOSTILE]
    texts = {
        "en": html(comparison, arms, "en", {"mAP50": 0.6}),
        "zh": html(comparison, arms, "zh-TW"),
        "hostile": html(make_comparison(bad, HOSTILE[0], warnings=warnings), bad, targets={HOSTILE[0]: 1.0}),
    }
    for name, text in texts.items():
        write(text, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in texts}


class Opened:
    """A page that is drawn, with all that went wrong on the way."""

    def __init__(self, browser, path: Path, size=DESKTOP, **options):
        self.troubles: list[str] = []
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.troubles.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.troubles.append(f"error: {e}"))
        self.page.on("dialog", lambda d: self.troubles.append("dialog"))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri(), timeout=120_000)
        self.page.wait_for_selector(DRAWN, state="attached", timeout=120_000)

    def _asked(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.troubles.append(f"request: {request.url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.fixture(scope="module")
def desktop(browser, files):
    with Opened(browser, files["en"]) as opened:
        yield opened


def charts(page):
    return page.locator(".chart")


def test_every_chart_is_drawn_without_an_error_or_a_request(desktop):
    assert desktop.troubles == []
    shown = json.loads(
        desktop.page.evaluate("""() => JSON.stringify([...document.querySelectorAll(".chart")].map((c) => ({
        marks: c.querySelectorAll(".cartesianlayer :is(path.point, path.js-line, image, .bars path)").length,
        values: c._fullData.reduce((n, t) => n + (t.z ? t.z.flat() : t.x).filter(Number.isFinite).length, 0),
    })))""")
    )
    assert len(shown) > 15
    assert all(chart["marks"] > 0 and chart["values"] > 0 for chart in shown), shown


def hover(page, chart):
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").first.bounding_box()
    for part in (0.5, 0.45, 0.55, 0.4, 0.6):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + 0.5 * box["height"])
        page.wait_for_timeout(150)
        text = " ".join(chart.locator(".hoverlayer text").all_text_contents())
        if text:
            return text
    return ""


@pytest.mark.parametrize("panel", ["Training loss, unweighted", "Cosine by layer and time"])
def test_hovering_tells_the_numbers(desktop, panel):
    figure = desktop.page.locator("figure", has=desktop.page.locator("h3", has_text=panel))
    text = hover(desktop.page, figure.locator(".chart").first)
    for word in ("joint", "gradnorm") if "loss" in panel else ("model.", "step", "cosine"):
        assert word in text


def test_the_keyboard_reaches_every_control_and_moves_through_a_chart(desktop):
    page = desktop.page
    wanted = page.evaluate("document.querySelectorAll('a[href], button, summary, .chart').length")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    seen = set()
    for _ in range(4 * wanted):
        page.keyboard.press("Tab")
        key = page.evaluate("""() => { const all = [...document.querySelectorAll("a[href], button, summary, .chart")];
            return all.indexOf(document.activeElement); }""")
        seen.add(key)
        if len(seen - {-1}) == wanted:
            break
    assert len(seen - {-1}) == wanted


def test_arrows_tell_points_and_plus_zooms_and_zero_resets(desktop):
    page = desktop.page
    chart = page.locator("figure", has=page.locator("h3", has_text="Task weights")).locator(".chart").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    first = page.locator("#live").text_content()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    assert first
    assert page.locator("#live").text_content() != first
    ranges = []
    for key in ("+", "0"):
        page.keyboard.press(key)
        ranges.append(chart.evaluate("c => c._fullLayout.xaxis.range.map(Number)"))
    home = chart.evaluate("c => c.home.xaxis.map(Number)")
    assert ranges[0][1] - ranges[0][0] == pytest.approx((home[1] - home[0]) / 2)
    assert ranges[1] == pytest.approx(home)


def test_keys_walk_through_a_heatmap_too(desktop):
    page = desktop.page
    chart = page.locator("figure", has=page.locator("h3", has_text="Cosine by layer")).locator(".chart").first
    chart.focus()
    said = []
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        said.append(page.locator("#live").text_content())
    assert "model.0.conv" in said[0]
    assert "model.1.conv" in said[1]


def test_a_legend_button_hides_an_arm_in_all_charts_of_its_panel(desktop):
    page = desktop.page
    panel = page.locator("figure", has=page.locator("h3", has_text="Training loss"))
    button = panel.locator("button[data-group=gradnorm]")
    button.click()
    visible = """cs => cs.map(c => c._fullData.filter(t => t.legendgroup === "gradnorm").map(t => t.visible))"""
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(any(row) for row in panel.locator(".chart").evaluate_all(visible))
    button.click()
    assert all(all(row) for row in panel.locator(".chart").evaluate_all(visible))


def test_buttons_zoom_all_charts_of_a_panel(desktop):
    page = desktop.page
    panel = page.locator("figure", has=page.locator("h3", has_text="Training loss"))
    span = "cs => cs.map(c => c._fullLayout.xaxis.range[1] - c._fullLayout.xaxis.range[0])"
    before = panel.locator(".chart").evaluate_all(span)
    panel.locator("button[data-action=in]").click()
    assert panel.locator(".chart").evaluate_all(span) == pytest.approx([x / 2 for x in before])
    panel.locator("button[data-action=reset]").click()
    assert panel.locator(".chart").evaluate_all(span) == pytest.approx(before)


def test_a_picture_can_be_saved_from_the_page_itself(desktop):
    page = desktop.page
    panel = page.locator("figure", has=page.locator("h3", has_text="Cosine over all shared layers"))
    with page.expect_download() as download:
        panel.locator("button[data-action=save]").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.lstrip().startswith("<svg")
    assert desktop.troubles == []


def test_the_example_takes_a_picture(files, tmp_path):
    script = Path(__file__).parents[1] / "examples/study/picture.py"
    for words in ([], ["--dark", "--width", "390", "--section", "where"]):
        out = tmp_path / f"{len(words)}.png"
        subprocess.run([sys.executable, str(script), str(files["en"]), str(out), *words], check=True)
        assert out.stat().st_size > 30_000


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["en", "zh"])
def test_nothing_is_wider_than_the_screen(browser, files, size, name, tmp_path):
    with Opened(browser, files[name], size) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        too_wide = page.evaluate("""() => [...document.querySelectorAll(".chart")].filter((c) =>
            c.querySelector("svg").getBoundingClientRect().width > c.clientWidth + 1).length""")
        assert too_wide == 0
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 100_000
        assert opened.troubles == []


def test_a_phone_scrolls_over_charts_and_has_buttons_a_finger_can_press(browser, files):
    with Opened(browser, files["en"], PHONE, has_touch=True, is_mobile=True) as opened:
        page = opened.page
        assert page.evaluate("document.querySelector('.chart')._fullLayout.dragmode") is False
        heights = page.locator("button").evaluate_all("bs => bs.map(b => b.getBoundingClientRect().height)")
        assert min(heights) >= 44


def colour(palette, name):
    return f"rgb({', '.join(str(int(palette[name][i : i + 2], 16)) for i in (1, 3, 5))})"


GROUND = "getComputedStyle(document.querySelector('.chart .main-svg')).backgroundColor"
INK = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"


def test_charts_follow_the_page_into_the_dark_and_back(browser, files):
    with Opened(browser, files["en"], color_scheme="dark") as opened:
        page = opened.page
        assert page.evaluate(GROUND) == colour(DARK, "surface")
        assert page.evaluate(INK) == colour(DARK, "ink")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour(DARK, "page")
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(1500)
        assert page.evaluate(GROUND) == colour(LIGHT, "surface")
        assert page.evaluate(INK) == colour(LIGHT, "ink")
        assert opened.troubles == []


def test_print_is_light_and_charts_fit_the_sheet_even_in_the_dark(browser, files, tmp_path):
    with Opened(browser, files["en"], color_scheme="dark") as opened:
        page = opened.page
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(GROUND) == colour(LIGHT, "surface")
        assert max(page.locator(".chart").evaluate_all("cs => cs.map(c => c._fullLayout.width)")) <= 680
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(GROUND) == colour(DARK, "surface")
        page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
        assert (tmp_path / "page.pdf").stat().st_size > 50_000


CONTRAST = """() => {
    const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const weak = [];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
        if (!own || !node.getClientRects().length || node.closest("script, style, svg, .unseen, .skip")) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(`${node.className}: ${node.textContent.slice(0, 40)}`);
    }
    return weak;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_as_it_is_drawn_has_a_contrast_of_four_and_a_half(browser, files, scheme):
    with Opened(browser, files["en"], color_scheme=scheme) as opened:
        assert opened.page.evaluate(CONTRAST) == []


def test_everything_has_a_name_and_a_place_for_those_who_do_not_see_it(desktop):
    found = desktop.page.evaluate("""() => {
        const all = (q) => [...document.querySelectorAll(q)];
        const label = (n) => n.getAttribute("aria-labelledby") || n.getAttribute("aria-describedby");
        const ids = all("[id]").map((n) => n.id).filter((id) => !/^(clip|leg|cb|g)?[0-9a-f]{4,}|^clip|-/.test(id));
        return {
            lang: document.documentElement.lang,
            landmarks: ["header", "nav", "main", "footer"].map((q) => document.querySelectorAll(q).length),
            unnamed: all("button, a, .chart, [role=region], [role=img], [role=group], nav").filter((n) =>
                !(n.getAttribute("aria-label") || n.textContent || label(n) || "").trim()).length,
            charts: all(".chart").filter((n) => n.getAttribute("role") !== "img" || n.tabIndex !== 0).length,
            tables: all("table").filter((t) => !t.caption || t.querySelectorAll("th[scope=col]").length === 0).length,
            broken: all("[aria-labelledby], [aria-describedby]").filter(
                (n) => !document.getElementById(label(n))).length,
            twice: ids.filter((id, i) => ids.indexOf(id) !== i),
            without: all("figure").filter((f) => !f.querySelector("details table")).length,
        };
    }""")
    assert found == {
        "lang": "en", "landmarks": [1, 1, 1, 1],
        "unnamed": 0, "charts": 0, "tables": 0, "broken": 0, "twice": [], "without": 0,
    }  # fmt: skip


def test_hostile_names_stay_names(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        assert opened.troubles == []
        assert page.evaluate("typeof boom") == "undefined"
        assert page.evaluate("document.querySelectorAll('img, iframe, object, a[href^=http], svg a').length") == 0
        text = page.evaluate("document.body.innerText")
        assert HOSTILE[0] in text
        assert "49" not in page.locator("h1").text_content()  # {{ 7*7 }}
        for i in range(charts(page).count()):
            hover(page, charts(page).nth(i)) if i % 5 == 0 else None
        assert page.evaluate("document.querySelectorAll('svg a').length") == 0
        assert opened.troubles == []
