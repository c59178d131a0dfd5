"""Screenshots of the page, as docs/app.md shows them.

python tests/app/browser/screenshots.py --out docs/images          # those of docs/app.md
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


def shoot(page: Any, out: Path, name: str, height: int | None = None, colours: int = COLOURS) -> None:
    """Write what the window shows, or its upper part, with few colours (0: with all)."""
    page.evaluate("() => window.scrollTo(0, 0)")
    page.wait_for_timeout(400)  # animations end
    clip = None if height is None else {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
    path = out / f"app_{name}.png"
    page.screenshot(path=path, **({} if clip is None else {"clip": clip}))
    with Image.open(path) as image:
        small = image.convert("RGB")
    if colours:
        small = small.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
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
            page.set_viewport_size({"width": 1280, "height": 1740})
            customize(page, Path(folder))
            shoot(page, options.out, "customize", colours=0)  # soft edges of masks
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


def customize(page: Any, folder: Path) -> None:
    """Two subjects, one painted and one boxed, with their places, and the picture."""
    from gensparse.embedded.render import render
    from gensparse.embedded.scenes import Scene, Subject

    tools.go(page, "Customize")
    page.locator("#gs-customize-prompt textarea").fill(
        "a red plain heart on the left and a blue striped star on the right on a white plain background"
    )
    words = {"heart": ("red", "plain"), "star": ("blue", "striped")}
    for number, (name, (colour, fill)) in enumerate(words.items(), 1):
        scene = Scene((Subject(name, colour, fill, "large", 0.5, 0.45, 0.33),), "plain", "white")
        Image.fromarray(render(scene, 384, 384)).save(folder / f"{name}.png")
        page.locator(f"#gs-customize-picture-{number} input[type=file]").set_input_files(folder / f"{name}.png")
        page.locator(f"#gs-customize-seen-{number} gs-mask[data-ready]").wait_for()
        page.locator(f"#gs-customize-name-{number} input, #gs-customize-name-{number} textarea").fill(name)
        page.locator(f"#gs-customize-words-{number} textarea").fill(
            f"a {colour} {fill} {name} on a white plain background"
        )
    inside = [
        (0.27, 0.25),
        (0.36, 0.27),
        (0.27, 0.32),
        (0.42, 0.3),
        (0.58, 0.3),
        (0.64, 0.25),
        (0.73, 0.27),
        (0.74, 0.33),
    ]
    inside += [
        (0.26, 0.38),
        (0.73, 0.39),
        (0.31, 0.46),
        (0.68, 0.46),
        (0.36, 0.53),
        (0.63, 0.53),
        (0.5, 0.66),
        (0.5, 0.6),
    ]
    tools.drag(page, "#gs-customize-seen-1 canvas", *inside)
    page.locator("#gs-customize-seen-2").get_by_role("button", name="Box").click()
    tools.drag(page, "#gs-customize-seen-2 canvas", (0.15, 0.1), (0.85, 0.8))
    for name, left in (("heart", 0.05), ("star", 0.53)):
        page.locator("#gs-customize-places").get_by_role("button", name=name).click()
        tools.drag(page, "#gs-customize-places .gs-canvas", (left, 0.2), (left + 0.42, 0.8))
        page.locator(".gs-place:visible", has_text=name).wait_for()
    tools.put(page, "Subject method", "isolation")
    page.get_by_label("Random seed").locator("visible=true").uncheck()
    tools.put(page, "Seed", "3")
    tools.start(page, "customize")
    tools.done(page, "customize")
    page.get_by_role("button", name="Subject 2").locator("visible=true").click()
    page.mouse.move(5, 5)


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
    tabs = (
        ("Generate", "generate"),
        ("Customize", "customize"),
        ("Attention lab", "lab"),
        ("History and presets", "history"),
    )
    for tab, name in tabs:
        tools.go(narrow, tab)
        narrow.wait_for_timeout(2500)
        narrow.screenshot(path=out / f"app_narrow_{name}.png", full_page=True)


if __name__ == "__main__":
    main()
