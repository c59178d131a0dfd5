"""What visitors see: words for every state, and nothing from outside as markup."""

from pathlib import Path

import pytest
from PIL import Image

from gensparse.app import render
from gensparse.app.jobs import Job, State
from gensparse.app.viewer import file_url, viewer
from gensparse.engine.values import Event, Output, Result
from gensparse.engine.words import command_of, python_of
from gensparse.request import GenerateRequest, UpscaleRequest

EVIL = "<script>alert(1)</script>\"'{{constructor}}${1}`"


def job(state: State = State.RUNNING, **facts) -> Job:
    return Job("id", "me", "generate", lambda *_: None, state=state, started=1.0, **facts)


def result(prompt: str = "a star", **fields) -> Result:
    request = GenerateRequest(
        prompt=prompt, seed=(7,), size="512x512", steps=4, guidance=3.5, attention="clear:radius=8"
    )
    output = Output("/out/0001.png", 512, 512, 7, "0" * 64, None)
    stages = [
        {"stage": 0, "width": 256, "height": 256, "method": "dense"},
        {"stage": 1, "width": 512, "height": 512, "method": {"method": "clear"}, "sparse": 8, "density": 0.25},
    ]
    attention = {"stages": stages} | fields.pop("attention", {})
    timings = {"total": 12.3}
    return Result("ok", (output,), request.to_dict(portable=True), timings, {}, attention, {"torch": "2.13"}, **fields)


def test_states_are_told_in_words() -> None:
    assert render.job_words(job(State.QUEUED), 1) == "Next in the queue."
    assert render.job_words(job(State.QUEUED), 3) == "Waiting: 2 jobs before it."
    event = Event("step", stage=1, stages=3, step=4, steps=20, width=512, height=256, eta=125.0)
    assert render.job_words(job(event=event)) == "Stage 2/3 512x256, step 4/20, 2 min 05 s left."
    stopping = job(event=event)
    stopping.cancel.set()
    assert render.job_words(stopping).startswith("Stopping after this step.")
    assert render.job_words(job(State.CANCELLED, reason="its page was closed")) == "Cancelled: its page was closed."
    assert "12 s" in render.job_words(job(State.DONE, result=result()))


def test_errors_say_cause_and_remedy() -> None:
    card = render.error_card("needs about 9.1 GiB, 4.0 GiB are available; --size 2048 fits")
    assert "needs about 9.1 GiB, 4.0 GiB are available</p>" in card
    assert "Try: --size 2048 fits" in card


@pytest.mark.parametrize("state", list(State))
def test_fault_30_nothing_from_outside_is_markup(state: State) -> None:
    shown = job(state, error=EVIL, reason=EVIL, warnings=[EVIL], event=Event("step", steps=2), result=None)
    for page in (render.job_card(shown), render.error_card(EVIL), render.copyable(EVIL), render.table([{EVIL: EVIL}])):
        assert "<script" not in page
        assert "{{" not in page
        assert "${" not in page
        assert "`" not in page
    command, python = render.again(result(EVIL))
    assert "<script" not in command + python
    assert "{{" not in command + python
    hostile = result(attention={"stages": [{"stage": 0, "method": EVIL, "backend": EVIL, "dense": {EVIL: 1}}]})
    assert "<script" not in render.what_ran(hostile)


def test_progress_has_a_bar_and_a_small_picture() -> None:
    shown = job(event=Event("step", step=5, steps=10, stages=1), preview=Image.new("RGB", (900, 300), "red"))
    page = render.job_card(shown)
    assert 'aria-valuenow="50"' in page
    assert "data:image/jpeg;base64," in page
    assert len(page) < 40_000
    assert render.job_card(shown) == page
    assert "<img" not in render.job_card(job(State.DONE, result=result()))


def test_the_report_names_stages_and_versions() -> None:
    page = render.what_ran(result())
    for words in ("sparse attention in 1 of 2", "512x512", "clear", "0.2500", "torch", "2.13"):
        assert words in page.lower() or words in page


def test_commands_and_python_make_the_request_again() -> None:
    made = render.request_of_result(result("it's a $HOME `star`"))
    command = command_of(made)
    assert command.startswith("gensparse generate ")
    assert "--attention clear:radius=8" in command
    assert "--seed 7" in command
    assert command.endswith("-- 'it'\"'\"'s a $HOME `star`'")
    names: dict = {}
    code = python_of(made).replace("print(execute", "print((lambda *_: None)").replace(".outputs[0].path", "")
    exec(code, names)
    assert names["request"] == made
    upscale = UpscaleRequest(image="/home/me/photo.png", prompt="a cat", strength=0.2)
    assert "/home/me" not in command_of(upscale) + python_of(upscale)
    assert command_of(upscale) == "gensparse upscale --strength 0.2 INPUT -p 'a cat'"


def test_pictures_are_shown_by_address_as_they_are_on_disk() -> None:
    page = viewer([Output("/out/a b/0001.png", 512, 256, 7, "0" * 64, None)])
    assert file_url(Path("/out/a b/0001.png")) == "gradio_api/file=/out/a%20b/0001.png"
    assert page.count("gradio_api/file=/out/a%20b/0001.png") == 2
    assert "512 x 256" in page
    assert viewer([]) == ""
