"""Visitors: cookies that cannot be made up, folders that are read by their owner only, and who is still there."""

import time
from pathlib import Path

import pytest

from gensparse.app.sessions import Sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    (tmp_path / "scratch").mkdir()
    return Sessions(tmp_path / "out", tmp_path / "scratch")


def test_only_cookies_of_this_server_count(sessions: Sessions, tmp_path: Path) -> None:
    token = sessions.issue()
    assert sessions.is_valid(token)
    assert sessions.issue() != token
    body, _, signature = token.partition(".")
    other = Sessions(tmp_path / "out", tmp_path / "scratch").issue()
    for wrong in (
        None,
        "",
        "x",
        body,
        f"{body}.{'0' * 64}",
        f"{body[:-1]}A.{signature}",
        other,
        token + "0",
        "é" * 108,
    ):
        assert not sessions.is_valid(wrong)
        assert sessions.owner(wrong) is None
    owner = sessions.owner(token)
    assert owner == sessions.owner(token, "another page of the same browser")
    assert body not in owner
    assert sessions.owner(None, "abc") == sessions.owner("forged", "abc")
    assert sessions.owner(None, "abc") != sessions.owner(None, "abd")


def test_folders_tell_nothing_and_stay(sessions: Sessions) -> None:
    token = sessions.issue()
    owner = sessions.owner(token)
    folder = sessions.folder(owner)
    assert folder == sessions.folder(owner)
    assert folder.parent == sessions.root
    assert folder.stat().st_mode & 0o077 == 0
    assert owner not in folder.name
    assert token.split(".")[0] not in folder.name
    assert sessions.new_folder(owner) != sessions.new_folder(owner)


def test_fault_29_files_are_read_by_their_owner_only(sessions: Sessions, tmp_path: Path) -> None:
    mine = sessions.folder("cookie-me")
    (mine / "a.png").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (mine / "link").symlink_to(tmp_path / "secret")
    assert sessions.may_read(mine / "a.png", "cookie-me")
    for owner in ("cookie-you", None, ""):
        assert not sessions.may_read(mine / "a.png", owner)
    for path in (
        tmp_path / "secret",
        mine / ".." / ".." / "secret",
        mine / "link",
        sessions.root,
        sessions.root / "unknown" / "a.png",
        Path("/etc/passwd"),
        Path("a.png"),
    ):
        assert not sessions.may_read(path, "cookie-me"), path


def test_uploads_belong_to_those_who_sent_them(sessions: Sessions) -> None:
    path = sessions.scratch / "0123" / "photo.png"
    sessions.own_upload(str(path), "cookie-me")
    assert sessions.may_read(path, "cookie-me")
    assert not sessions.may_read(path, "cookie-you")
    sessions.own_upload(str(path), "cookie-you")  # the very same bytes
    assert sessions.may_read(path, "cookie-you")
    program = sessions.scratch / "4567" / "photo.png"
    sessions.own_upload(str(program), None)
    assert sessions.may_read(program, None), "programs keep no cookies; they know the path"


def test_a_visitor_is_there_while_one_of_his_pages_is_open(sessions: Sessions) -> None:
    assert sessions.away("me") == float("inf")
    sessions.connect("me")
    sessions.connect("me")
    sessions.disconnect("me")
    assert sessions.away("me") == 0
    sessions.disconnect("me")
    assert 0 <= sessions.away("me") < 5
    sessions.touch("you")
    assert sessions.away("you") < 5


def test_what_visitors_left_is_deleted_after_a_while(sessions: Sessions) -> None:
    gone, here, late = (sessions.folder(owner) for owner in ("gone", "here", "late"))
    sessions.touch("gone")
    sessions.connect("here")
    time.sleep(0.05)
    sessions.touch("late")
    assert sessions.sweep(0.04) == 1
    assert not gone.exists()
    assert here.exists()
    assert late.exists()
    assert not sessions.may_read(gone / "a.png", "gone")
    sessions.forget_all()
    assert not list(sessions.root.iterdir())
