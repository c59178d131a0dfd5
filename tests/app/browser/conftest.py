"""One server, one browser and one visitor for all tests of a module that drive the page in a real browser."""

from collections.abc import Iterator

import browser_tools as tools
import pytest


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A browser with one visitor, and the server's address as `context.url`."""
    reason = tools.why_not()
    assert reason is None, f"the tests of the page must run here: {reason}"
    from gensparse.app import Server

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "home"))
        patch.setenv("HOME", str(folder / "home"))
        with Server(tools.settings_for(folder)) as server, tools.chromium() as browser:
            made = browser.new_context(viewport={"width": 1280, "height": 900})
            made.url = server.url
            yield made
            made.close()


@pytest.fixture
def page(context) -> Iterator:
    """A fresh page; nothing in it may complain, and it may talk to its own server only."""
    opened, watch = tools.open_page(context, context.url)
    yield opened
    opened.close()
    assert not watch.errors
    assert not watch.foreign
