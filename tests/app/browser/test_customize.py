"""Pictures with given subjects, in a real browser: painted masks, drawn places, turns."""

import re
from pathlib import Path

import browser_tools as tools
import numpy as np
import pytest
from PIL import Image, ImageDraw

from gensparse.image_io import read_metadata, write_image
from gensparse.request import CustomizeRequest
from gensparse.subjects.read_masks import read_mask

pytestmark = tools.NEEDED
TAB = "customize"


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    """A red disc in the upper left of a photograph that lies on its side, and a blue triangle."""
    exif = Image.Exif()
    exif[0x0112] = 6  # 64 x 48 pixels are shown as 48 x 64
    upright = Image.new("RGB", (48, 64), "white")
    ImageDraw.Draw(upright).ellipse((2, 2, 22, 30), fill="red")
    upright.rotate(90, expand=True).save(tmp_path / "disc.png", exif=exif)
    other = Image.new("RGB", (60, 60), "white")
    ImageDraw.Draw(other).polygon([(30, 5), (55, 55), (5, 55)], fill="blue")
    other.save(tmp_path / "triangle.jpg")
    return tmp_path / "disc.png", tmp_path / "triangle.jpg"


def field(page, name: str):
    return page.locator(f"#gs-customize-{name} input, #gs-customize-{name} textarea").first


def upload(page, number: int, path: Path) -> None:
    page.locator(f"#gs-customize-picture-{number} input[type=file]").set_input_files(path)
    page.locator(f"#gs-customize-seen-{number} gs-mask[data-ready]").wait_for()


def fill(page, photos: tuple[Path, Path], *, size: str = "64x64", steps: int = 8) -> None:
    tools.go(page, "Customize")
    page.locator("#gs-customize-prompt textarea").fill("a red circle and a blue triangle")
    for number, (name, path) in enumerate(zip(("circle", "triangle"), photos, strict=True), 1):
        upload(page, number, path)
        field(page, f"name-{number}").fill(name)
    tools.put(page, "Size", size)
    tools.put(page, "Steps", str(steps))


def saved(page, context, folder: Path) -> dict:
    """The request inside of the picture that is shown."""
    source = page.locator("#gs-customize-result .gs-stage img").first.get_attribute("src")
    answer = context.request.get(f"{context.url.rstrip('/')}/{source}")
    (folder / "got.png").write_bytes(answer.body())
    return read_metadata(folder / "got.png")["request"]


def test_two_subjects_from_their_pictures_to_the_next_turn(page, context, photos, tmp_path: Path) -> None:
    fill(page, photos, steps=40)
    page.locator("#gs-customize-seen-1").get_by_text("48 x 64 pixels").wait_for()
    tools.drag(page, "#gs-customize-seen-1 canvas", (0.15, 0.1), (0.4, 0.25), (0.3, 0.45))
    tools.until(lambda: field(page, "mask-1").input_value().startswith("48x64:"))
    page.locator("#gs-customize-seen-2").get_by_role("button", name="Box").click()
    tools.drag(page, "#gs-customize-seen-2 canvas", (0.9, 0.95), (0.1, 0.05))
    tools.until(lambda: field(page, "mask-2").input_value().count(":") == 3)
    places = page.locator("#gs-customize-places")
    places.get_by_role("button", name="triangle").wait_for()
    places.get_by_role("button", name="circle").click()
    tools.drag(page, "#gs-customize-places .gs-canvas", (0.05, 0.1), (0.45, 0.9))
    tools.until(lambda: field(page, "box-1").input_value())
    places.locator(".gs-place:visible", has_text="circle").wait_for()
    places.get_by_role("button", name="triangle").click()
    tools.put(page, "Seed", "5")
    page.get_by_label("Random seed").locator("visible=true").uncheck()
    field(page, "box-2").fill("0.5, 0, 1, 1")
    places.locator(".gs-place:visible", has_text="triangle").wait_for()
    page.locator("#gs-customize-cost .gs-card").get_by_text("64x64").first.wait_for()

    tools.start(page, TAB)
    page.locator("#gs-customize-cancel").wait_for()
    seen = set()

    def moved() -> bool:
        seen.add(tools.progress(page, TAB))
        return page.locator("#gs-customize-result gs-viewer:not([data-before])").count() > 0

    tools.until(moved, 120)
    assert len(seen - {None}) >= 2, "the bar never moved"
    tools.done(page, TAB)
    assert tools.natural(page, "#gs-customize-result .gs-stage img") == (64, 64)
    request = saved(page, context, tmp_path)
    assert request["subject"][0] == "circle=1-circle.png@1-circle-mask.png"
    assert re.fullmatch(r"triangle=2-triangle\.jpg@0\.1\d*:0\.0\d*:0\.[89]\d*:0\.9\d*", request["subject"][1])
    (circle, *box), other = request["layout"]
    assert circle == "circle"
    assert np.allclose(box, (0.05, 0.1, 0.45, 0.9), atol=0.02)
    assert other == ["triangle", 0.5, 0.0, 1.0, 1.0]
    page.get_by_role("button", name="Make it again").locator("visible=true").click()
    with page.expect_download() as download:
        page.locator("#gs-customize-command").get_by_role("link", name="1-circle-mask.png").click()
    mask = read_mask(download.value.path()).numpy()
    assert mask.shape == (64, 48), "upright, as the photograph is shown"
    assert mask[:38, :26].any()
    assert not mask[45:].any()
    assert not mask[:, 32:].any()

    page.locator("#gs-customize-next textarea").fill("a blue triangle at night")
    page.locator("gs-viewer").evaluate_all("all => all.forEach(one => one.setAttribute('data-before', ''))")
    page.locator("#gs-customize-continue").click()
    tools.done(page, TAB)
    tools.until(lambda: page.locator("#gs-customize-turns img").count() == 2)
    request = saved(page, context, tmp_path)
    assert (request["prompt"], request["seed"], request["steps"]) == ("a blue triangle at night", [5], 40)
    assert [text.partition("=")[0] for text in request["subject"]] == ["triangle"]
    page.locator("#gs-customize-command").get_by_text("--turns story.json").wait_for()
    page.reload()
    page.locator("#gs-generate-run").wait_for()
    tools.go(page, "Customize")
    tools.done(page, TAB)
    tools.until(lambda: page.locator("#gs-customize-turns img").count() == 2)

    tools.go(page, "History and presets")
    page.locator("#gs-history-gallery button img").first.click()
    page.locator("#gs-history-picture gs-viewer .gs-stage img").wait_for()
    page.locator("#gs-history-load").click()
    page.locator("#gs-customize-run").wait_for()
    tools.until(lambda: field(page, "name-1").input_value() == "triangle")
    assert field(page, "box-1").input_value() == "0.5, 0, 1, 1"


def test_places_of_subjects_that_are_folded_away_are_drawn_too(page, tmp_path: Path) -> None:
    names = ("circle", "star", "heart")
    request = CustomizeRequest(prompt="three shapes", subject=names, subject_method="consistory")
    metadata = {"gensparse": 1, "request": request.to_dict(portable=True)}
    write_image(Image.new("RGB", (32, 32), "red"), tmp_path / "x.png", metadata=metadata)
    tools.go(page, "History and presets")
    page.locator("#gs-reload-file input[type=file]").set_input_files(tmp_path / "x.png")
    message = page.locator("#gs-reload-message textarea")
    tools.until(lambda: message.count() and "upload them again" in message.input_value())
    tools.go(page, "Customize")
    places = page.locator("#gs-customize-places")
    places.get_by_role("button", name="heart").click()
    tools.drag(page, "#gs-customize-places .gs-canvas", (0.2, 0.3), (0.6, 0.9))
    places.locator(".gs-place:visible", has_text="heart").wait_for()
    page.get_by_role("button", name="Subjects 3 to 5").click()
    tools.until(lambda: field(page, "box-3").count() and field(page, "box-3").input_value())
    assert field(page, "name-3").input_value() == "heart"
    box = [float(part) for part in field(page, "box-3").input_value().split(",")]
    assert np.allclose(box, (0.2, 0.3, 0.6, 0.9), atol=0.02)
    places.get_by_role("button", name="No place").click()
    tools.until(lambda: field(page, "box-3").input_value() == "")


def test_cancel_in_the_middle_and_run_again(page, photos) -> None:
    fill(page, photos, size="256x256", steps=60)
    tools.start(page, TAB)
    tools.until(lambda: (tools.progress(page, TAB) or 0) > 0, 90)
    page.locator("#gs-customize-cancel").click()
    page.locator("#gs-customize-card").get_by_text(re.compile("[Cc]ancelled")).wait_for(timeout=tools.WAIT)
    assert page.locator("#gs-customize-result gs-viewer").count() == 0
    assert page.locator("#gs-customize-next").is_hidden()
    tools.put(page, "Size", "64x64")
    tools.put(page, "Steps", "2")
    tools.start(page, TAB)
    tools.done(page, TAB)


def test_what_is_missing_or_outside_is_said_in_plain_words(page, photos) -> None:
    tools.go(page, "Customize")
    upload(page, 2, photos[0])
    alert = page.locator("#gs-customize-card [role=alert]")
    tools.start(page, TAB)
    alert.get_by_text("subject 2 has a picture and no name").wait_for()
    alert.get_by_text("name it with a word of the prompt").wait_for()
    field(page, "name-2").fill("circle")
    field(page, "box-2").fill("0, 0, 1.5, 1")
    page.locator("#gs-customize-places [role=alert]").get_by_text("the box of 'circle'").wait_for()
    tools.start(page, TAB)
    alert.get_by_text("0 <= left < right <= 1").wait_for()
    assert page.locator("#gs-customize-cancel").is_hidden()


def test_masks_are_painted_with_a_finger_on_narrow_screens(context, photos) -> None:
    phone = context.browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    page, watch = tools.open_page(phone, context.url)
    try:
        tools.go(page, "Customize")
        upload(page, 1, photos[0])
        canvas = page.locator("#gs-customize-seen-1 canvas")
        canvas.scroll_into_view_if_needed()
        canvas.tap()
        tools.until(lambda: field(page, "mask-1").input_value())
        page.locator("#gs-customize-seen-1").get_by_role("button", name="Clear").tap()
        tools.until(lambda: field(page, "mask-1").input_value() == "")
        assert tools.wide(page) <= 0
        page.locator(
            "#gs-customize-picture-1 button:is([aria-label='Clear'], [aria-label='Remove this file'])"
        ).first.tap()
        page.locator("#gs-customize-seen-1 gs-mask").wait_for(state="detached")
        upload(page, 1, photos[1])
        tools.until(lambda: page.locator("#gs-customize-seen-1").get_by_text("60 x 60 pixels").count())
    finally:
        phone.close()
    assert not watch.errors
