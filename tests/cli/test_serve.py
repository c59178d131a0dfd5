"""`gensparse app`: what it refuses before anything is served."""

from collections.abc import Callable

import pytest

from gensparse.cli.serve import _login
from gensparse.errors import ConfigError

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--auth", "nobody"], "USER:PASS"),
        (["--auth", ":x"], "USER:PASS"),
        (["--max-size", "10"], "side"),
        (["--max-queue", "0"], "queue"),
        (["--port", "99999"], "port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_with_code_2(cli: Cli, words: list[str], said: str) -> None:
    code, out, err = cli("app", *words)
    assert code == 2
    assert said in err
    assert not out


def test_a_password_is_made_up_where_others_can_reach_the_page() -> None:
    assert _login(None, shared=False) == (None, False)
    login, made = _login(None, shared=True)
    assert made
    assert len(login[1]) >= 16
    assert _login(None, shared=True)[0] != login
    assert _login("me:a:b", shared=True) == (("me", "a:b"), False)
    with pytest.raises(ConfigError):
        _login("me:", shared=False)
