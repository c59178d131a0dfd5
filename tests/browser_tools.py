"""A real browser for tests of the page: Chromium of the system, driven by playwright."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = os.environ.get("GENSPARSE_BROWSER") == "required"
"""Set where a missing browser is a failure instead of a reason to skip."""

WAIT = 150_000  # milliseconds for whatever a model computes
# what Chromium itself says of a machine without a graphics card, or of a page that is left
_HARMLESS = ("GPU stall", "WebGL", "GroupMarkerNotSet", "net::ERR_ABORTED")


def program() -> str | None:
    """The browser of this machine, None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why no browser can be driven here, or None."""
    missing = [name for name in ("playwright", "gradio") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'gensparse[dev]'"
    return None if program() else "there is no Chromium; apt-get install chromium"


REASON = why_not()
NEEDED = pytest.mark.skipif(REASON is not None and not REQUIRED, reason=str(REASON))
"""For modules with tests that drive a browser."""


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        browser = play.chromium.launch(executable_path=program(), args=flags)
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What a page complains about, and whom it talks to."""

    def __init__(self, page: Any, url: str) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []
        home = urlsplit(url).netloc
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("request", lambda request: self._asked(request.url, home))
        page.on("response", lambda response: self._answered(response.status, response.url))

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" and not any(part in text for part in _HARMLESS):
            self.errors.append(text)

    def _asked(self, url: str, home: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != home:
            self.foreign.append(url)

    def _answered(self, status: int, url: str) -> None:
        if status >= 400:
            self.errors.append(f"{status} for {url}")


def open_page(browser_or_context: Any, url: str, **options: Any) -> tuple[Any, Watch]:
    """A page that has drawn its first tab, and its watch."""
    page = browser_or_context.new_page(**options)
    page.set_default_timeout(60_000)
    watch = Watch(page, url)
    page.goto(url)
    page.locator("#gs-generate-run").wait_for()
    page.locator("#gs-generate-cost .gs-card").wait_for()  # events work
    return page, watch


def go(page: Any, tab: str) -> None:
    """Bring a tab to the front; on narrow screens it may be in the menu of further tabs."""
    item = page.get_by_role("tab", name=tab, exact=True)
    if not any(one.is_visible() for one in item.all()):
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=tab).first.click()
    else:
        next(one for one in item.all() if one.is_visible()).click()


def field(page: Any, label: str) -> Any:
    """The visible input of that label."""
    own = f'input[aria-label="{label}"]:visible, textarea[aria-label="{label}"]:visible'
    inside = f'label:visible:has(span:text-is("{label}"))'
    return page.locator(f"{own}, {inside} input:visible, {inside} textarea:visible").first


def put(page: Any, label: str, value: str) -> None:
    """Type into a field and leave it."""
    box = field(page, label)
    box.fill(value)
    box.press("Enter")
    box.press("Escape")
    box.blur()


def until(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true answer of `what`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def progress(page: Any, name: str = "generate") -> int | None:
    """The number that the progress bar shows, None without a bar."""
    bars = page.locator(f"#gs-{name}-card [role=progressbar]")
    shown = bars.evaluate_all("all => all.map(bar => bar.getAttribute('aria-valuenow'))")  # it may go at any moment
    return int(shown[0]) if shown else None


def start(page: Any, name: str = "generate") -> None:
    """Press the button of a tab; pictures that are there from before do not count as its result."""
    page.locator("gs-viewer").evaluate_all("all => all.forEach(one => one.setAttribute('data-before', ''))")
    page.locator(f"#gs-{name}-run").click()


def done(page: Any, name: str = "generate") -> None:
    """Wait for a new finished picture in the viewer."""
    picture = page.locator(f"#gs-{name}-result gs-viewer:not([data-before]) .gs-stage img").first
    picture.wait_for(timeout=WAIT)
    page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=picture.element_handle(), timeout=WAIT)


def natural(page: Any, selector: str) -> tuple[int, int]:
    """(width, height) in pixels of the file behind an <img>."""
    size = page.locator(selector).first.evaluate("img => [img.naturalWidth, img.naturalHeight]")
    return size[0], size[1]


def drag(page: Any, selector: str, *places: tuple[float, float]) -> None:
    """Draw over an element with the button held, from place to place in shares of its width and height."""
    target = page.locator(selector).first
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def click_pixel(page: Any, selector: str, x: float, y: float) -> None:
    """Click an <img> where a pixel of its file is shown."""
    place = page.locator(selector).first
    place.scroll_into_view_if_needed()
    box = place.evaluate("img => { const b = img.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }")
    width, height = natural(page, selector)
    scale = min(box[2] / width, box[3] / height)
    left, top = box[0] + (box[2] - scale * width) / 2, box[1] + (box[3] - scale * height) / 2
    page.mouse.click(left + scale * x, top + scale * y)


def wide(page: Any) -> int:
    """Pixels by which the page is wider than the screen."""
    return page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")


def settings_for(folder: Path) -> Any:
    """Settings of a server for tests: a free port, its files in `folder`."""
    from gensparse.app import Settings

    return Settings(port=None, output_dir=folder / "out")
