"""The page in a real browser: one server and one browser for all of it, the embedded model at small sizes."""

import re
from pathlib import Path

import browser_tools as tools
from PIL import Image

from gensparse.app.lab import scale_for
from gensparse.image_io import write_image
from gensparse.patterns.draw import BARE_TOP, MARGIN
from gensparse.request import GenerateRequest

pytestmark = tools.NEEDED


def generate(page, *, size: str = "256x256", steps: int = 4, prompt: str = "a red circle") -> None:
    tools.go(page, "Generate")
    page.locator("#gs-generate-prompt textarea").fill(prompt)
    tools.put(page, "Size", size)
    tools.put(page, "Steps", str(steps))
    tools.start(page)


def test_generate_shows_progress_then_the_picture_that_zooms(page) -> None:
    generate(page, steps=16)
    page.locator("#gs-generate-cancel").wait_for()
    seen = set()

    def moved() -> bool:
        seen.add(tools.progress(page))
        return len(seen - {None}) >= 2 or page.locator("#gs-generate-result gs-viewer").count() > 0

    tools.until(moved)
    assert len(seen - {None}) >= 2, "the bar never moved"
    tools.done(page)
    assert tools.natural(page, "#gs-generate-result .gs-stage img") == (256, 256)
    zoom = page.locator("#gs-generate-result .gs-zoom")
    page.locator("#gs-generate-result").get_by_role("button", name=re.compile("One pixel")).click()
    assert zoom.inner_text() == "100%"
    page.locator("#gs-generate-result .gs-stage").focus()
    page.keyboard.press("+")
    assert zoom.inner_text() == "150%"
    page.mouse.move(*_middle(page, "#gs-generate-result .gs-stage"))
    page.mouse.wheel(0, -300)
    tools.until(lambda: int(zoom.inner_text().rstrip("%")) > 150)
    page.keyboard.press("0")
    assert zoom.inner_text() != "150%"


def _middle(page, selector: str) -> tuple[float, float]:
    box = page.locator(selector).first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_cancel_in_the_middle_and_run_again(page) -> None:
    generate(page, size="512x512", steps=60)
    tools.until(lambda: (tools.progress(page) or 0) > 0)
    page.locator("#gs-generate-cancel").click()
    page.locator("#gs-generate-card").get_by_text(re.compile("[Cc]ancelled")).wait_for(timeout=tools.WAIT)
    assert page.locator("#gs-generate-result gs-viewer").count() == 0
    generate(page, steps=3)
    tools.done(page)


def test_stages_are_compared_with_a_slider(page) -> None:
    generate(page, size="512x512", steps=3)
    tools.done(page)
    page.locator("#gs-generate-native").click()
    slider = page.locator("#gs-generate-slider")
    slider.locator("img").first.wait_for()
    tools.until(lambda: slider.locator("img").count() >= 2)
    assert tools.natural(page, "#gs-generate-slider img") == (512, 512)


def test_upload_respects_the_rotation_of_cameras(page, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: 64 x 48 pixels are shown as 48 x 64
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(tmp_path / "photo.jpg", exif=exif.tobytes())
    tools.go(page, "Upscale")
    page.locator("#gs-upscale-picture input[type=file]").set_input_files(tmp_path / "photo.jpg")
    page.locator("#gs-upscale-seen").get_by_text("48 x 64 pixels").wait_for()
    tools.start(page, "upscale")
    tools.done(page, "upscale")
    assert tools.natural(page, "#gs-upscale-result .gs-stage img") == (96, 128)


def test_bad_sizes_are_explained(page) -> None:
    generate(page, size="99999x99999")
    alert = page.locator("#gs-generate-card [role=alert]")
    alert.wait_for()
    assert "size" in alert.inner_text().lower() or "pixels" in alert.inner_text().lower()
    assert page.locator("#gs-generate-cancel").is_hidden()


def test_the_lab_draws_what_a_clicked_token_sees(page) -> None:
    tools.go(page, "Attention lab")
    picture = "#gs-lab-picture img"
    page.locator(picture).first.wait_for()
    status = page.locator("#gs-lab-status")
    status.get_by_text("row 32, column 32 sees").wait_for()  # the middle of 64 x 64 tokens
    page.locator("#gs-lab-costs table").wait_for()
    scale = scale_for((1, 64, 64))
    tools.click_pixel(page, picture, MARGIN + 5.5 * scale, BARE_TOP + 9.5 * scale)
    status.get_by_text("row 9, column 5 sees").wait_for()
    tools.put(page, "Radius", "0")
    page.locator("#gs-lab-status [role=alert]").wait_for()
    tools.put(page, "Radius", "5")
    status.get_by_text("Disc(radius=5)").wait_for()
    page.get_by_role("button", name="The same in Python").click()
    page.locator("#gs-lab-code").get_by_text("Clear(radius=5)").wait_for()
    page.locator("#gs-lab-use").click()
    page.locator("#gs-generate-run").wait_for()
    tools.until(lambda: tools.field(page, "Settings").input_value() == "radius=5")
    assert tools.field(page, "Attention").input_value() == "clear"


def test_every_method_of_the_lab_answers(page) -> None:
    tools.go(page, "Attention lab")
    status = page.locator("#gs-lab-status")
    status.get_by_text("sees").wait_for()
    for name, words in (("biformer", "run time"), ("double window", "Blocks"), ("Stripes (pattern)", "Stripes")):
        box = page.locator("#gs-lab-name input")
        box.fill(name)
        box.press("Enter")
        status.get_by_text(words).first.wait_for()
    assert page.locator("#gs-lab-use").is_disabled()  # a bare pattern is for Python


def test_settings_come_back_out_of_a_picture(page, tmp_path: Path) -> None:
    said = {
        "prompt": "a <b>blue</b> star",
        "size": "512x256",
        "steps": 7,
        "seed": (123,),
        "attention": "clear:radius=4",
    }
    data = GenerateRequest(**said).to_dict(portable=True) | {"model": "../../x", "trust_remote_code": True}
    write_image(Image.new("RGB", (32, 32), "red"), tmp_path / "x.png", metadata={"gensparse": 1, "request": data})
    tools.go(page, "History and presets")
    page.locator("#gs-reload-file input[type=file]").set_input_files(tmp_path / "x.png")
    message = page.locator("#gs-reload-message textarea")
    tools.until(lambda: message.count() and "prompt" in message.input_value())
    assert "model" in message.input_value()
    assert "trust_remote_code" in message.input_value()
    tools.go(page, "Generate")
    assert page.locator("#gs-generate-prompt textarea").input_value() == "a <b>blue</b> star"
    assert tools.field(page, "Size").input_value() == "512x256"
    assert tools.field(page, "Settings").input_value() == "radius=4"
    assert tools.field(page, "Seed").input_value() == "123"
    assert page.locator("b", has_text="blue").count() == 0


def test_the_history_keeps_pictures_and_presets(page) -> None:
    generate(page, steps=2, prompt="a green square")
    tools.done(page)
    tools.go(page, "History and presets")
    first = page.locator("#gs-history-gallery button img").first
    first.wait_for()
    first.click()
    page.locator("#gs-history-picture gs-viewer .gs-stage img").wait_for()
    page.locator("#gs-history-load").click()
    page.locator("#gs-generate-run").wait_for()
    tools.until(lambda: page.locator("#gs-generate-prompt textarea").input_value() == "a green square")
    tools.go(page, "History and presets")
    page.locator("#gs-preset-new textarea").or_(page.locator("#gs-preset-new input")).first.fill("small")
    page.locator("#gs-preset-save").click()
    page.locator("#gs-preset-said").get_by_text("Saved small").wait_for()
    page.locator("#gs-preset-load").click()
    page.locator("#gs-generate-run").wait_for()
    assert tools.field(page, "Steps").input_value() == "2"


def test_narrow_screens_do_not_scroll_sideways(context) -> None:
    page, watch = tools.open_page(context.browser, context.url, viewport={"width": 400, "height": 800})
    try:
        for tab in ("Generate", "Upscale", "Customize", "Attention lab", "History and presets"):
            tools.go(page, tab)
            if tab == "Attention lab":
                page.locator("#gs-lab-costs table").wait_for()
            assert tools.wide(page) <= 0, tab
        tools.go(page, "Generate")
        generate(page, steps=2)
        tools.done(page)
        assert tools.wide(page) <= 0
    finally:
        page.close()
    assert not watch.errors
