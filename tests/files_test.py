"""Paths of a user's home, and text that does not depend on the locale."""

import os

import pytest

from maect_jax import config, files, load_encoder
from maect_jax.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


def test_a_config_has_the_home_in_place_of_its_sign(home):
    names = {
        "data.path": "~/images",
        "init_from": "~/encoder.th,~/head.th",
        "finetune.images": "~/list.txt",
    }
    loaded = config.load("finetune", [f"{key}={value}" for key, value in names.items()])
    for key, value in names.items():
        assert config.flat(loaded)[key] == value.replace("~", home)
    lists = config.load("eval", ["eval.lowshot.lists=('~/1.txt','b~/2.txt')"])
    assert lists.eval.lowshot.lists == (f"{home}/1.txt", "b~/2.txt")
    assert config.load("finetune", ["finetune.images=1%"]).finetune.images == "1%"


def test_a_config_is_found_in_the_home(home):
    os.mkdir(home)
    (source,) = config.FOLDER.glob("quickstart.py")
    files.write_text(files.user_path("~/mine.py"), source.read_text(encoding="utf-8"))
    assert config.load("~/mine.py:test").name == "quickstart_test"


def test_a_home_of_nobody(home):
    wrong = r"~nobody-here.*there is no user 'nobody-here'"
    with pytest.raises(UserError, match=f"config.data.path='{wrong}"):
        config.load("eval", ["data.path=~nobody-here/images"])
    with pytest.raises(UserError, match=wrong):
        files.user_path("~nobody-here")
    with pytest.raises(UserError, match=rf"{home}/run: "):
        load_encoder("~/run")


def test_a_path_that_begins_with_the_sign_and_exists(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-user").mkdir()
    assert files.expanded("~no-user") == "~no-user"


def test_names_that_are_no_utf8_are_written_as_they_are(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xe5\x9b\xbe\n")
    files.write_text(tmp_path / "list", name)
    assert (tmp_path / "list").read_bytes() == b"caf\xe9 \xe5\x9b\xbe\n"
    files.write_json(tmp_path / "json", {"name": name})
    assert files.read_json(tmp_path / "json") == {"name": name}
