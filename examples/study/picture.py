"""A picture of a report, or of one of its sections, taken in the chromium of this machine."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="report.html, from gradprobe report")
    parser.add_argument("picture", type=Path, help="a PNG file, replaced if it exists")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--section", default="", help="such as where, ledger, metrics; default: the top of the page")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no chromium on this machine: apt-get install chromium")
    take(browser, options)


def take(browser: str, options: argparse.Namespace) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
            device_scale_factor=1.5,
        )
        page.goto(options.report.resolve().as_uri(), timeout=120_000)
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
        if options.section:
            page.locator(f"section#{options.section}").screenshot(path=options.picture)
        else:
            page.screenshot(path=options.picture)
        started.close()


if __name__ == "__main__":
    main()
