"""Screenshots of the page, as docs/app.md shows them.

python tests/app/browser/screenshots.py --out docs/images          # the three of the page on docs
python tests/app/browser/screenshots.py --out shots --all          # every tab, dark and narrow, to look at
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import browser_tools as tools
from PIL import Image

PROMPT = "a red circle left of a blue star on a green striped background"
COLOURS = 256  # of a stored picture: flat surfaces need no more


def shoot(page: Any, out: Path, name: str, height: int | None = None) -> None:
    """Write what the window shows, or its upper part, with few colours."""
    page.evaluate("() => window.scrollTo(0, 0)")
    page.wait_for_timeout(400)  # animations end
    clip = None if height is None else {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
    path = out / f"app_{name}.png"
    page.screenshot(path=path, **({} if clip is None else {"clip": clip}))
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(path, path.stat().st_size)


def fill(page: Any, size: str, steps: str) -> None:
    page.locator("#gs-generate-prompt textarea").fill(PROMPT)
    tools.put(page, "Size", size)
    tools.put(page, "Steps", steps)
    seed = page.get_by_label("Random seed")
    seed.uncheck()
    tools.put(page, "Seed", "7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--all", action="store_true", help="also dark, narrow, errors and every tab")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    from gensparse.app import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(tools.settings_for(Path(folder)))
        with server, tools.chromium() as browser:
            context = browser.new_context(viewport={"width": 1280, "height": 860})
            page, _ = tools.open_page(context, server.url)
            fill(page, "512x512", "10")
            tools.start(page)
            if options.all:
                tools.until(lambda: (tools.progress(page) or 0) > 20)
                shoot(page, options.out, "running")
            tools.done(page)
            page.mouse.move(5, 5)
            shoot(page, options.out, "generate")
            page.set_viewport_size({"width": 1280, "height": 1440})
            lab(page)
            shoot(page, options.out, "lab")
            page.set_viewport_size({"width": 1280, "height": 860})
            tools.go(page, "History and presets")
            page.locator("#gs-history-gallery button img").first.wait_for()
            page.locator("#gs-history-gallery button img").first.click()
            page.locator("#gs-history-picture gs-viewer .gs-stage img").wait_for()
            shoot(page, options.out, "history")
            if options.all:
                more(context, browser, server.url, options.out, page)


def lab(page: Any) -> None:
    """The lab, with a click off the middle."""
    tools.go(page, "Attention lab")
    page.locator("#gs-lab-costs table").wait_for()
    tools.click_pixel(page, "#gs-lab-picture img", 250, 300)
    page.wait_for_timeout(1500)
    page.mouse.move(5, 5)


def more(context: Any, browser: Any, url: str, out: Path, page: Any) -> None:
    """Pictures to look at, not to keep."""
    tools.go(page, "Upscale")
    shoot(page, out, "upscale")
    page.set_viewport_size({"width": 1280, "height": 2400})
    tools.go(page, "Attention lab")
    for title in ("What it is", "Layer and moment", "The same in Python", "Measured attention of this model"):
        page.get_by_role("button", name=title).first.click()
    shoot(page, out, "lab_long")
    dark, _ = tools.open_page(context, url + "?__theme=dark")
    lab(dark)
    shoot(dark, out, "lab_dark")
    tools.go(dark, "Generate")
    dark.wait_for_timeout(800)
    shoot(dark, out, "generate_dark")
    narrow, _ = tools.open_page(browser, url, viewport={"width": 400, "height": 900})
    for tab, name in (("Generate", "generate"), ("Attention lab", "lab"), ("History and presets", "history")):
        tools.go(narrow, tab)
        narrow.wait_for_timeout(2500)
        narrow.screenshot(path=out / f"app_narrow_{name}.png", full_page=True)


if __name__ == "__main__":
    main()
