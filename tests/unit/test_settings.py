"""Folders, registries and switches come from the environment and one file."""

import pytest

from lora_hub import settings
from lora_hub.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path))
    monkeypatch.delenv("LORAHUB_REGISTRY", raising=False)
    return tmp_path


def test_a_registry_is_a_location_or_a_name_of_the_config(home):
    (home / "config.toml").write_text('default = "team"\n[registries]\nteam = "/srv/a"\n')

    assert settings.registry_location(None) == "/srv/a"
    assert settings.registry_location("team") == "/srv/a"
    assert settings.registry_location("./here") == "./here"


def test_the_environment_comes_before_the_config(home, monkeypatch):
    (home / "config.toml").write_text('default = "/srv/a"\n')
    monkeypatch.setenv("LORAHUB_REGISTRY", "/srv/b")

    assert settings.registry_location(None) == "/srv/b"
    assert settings.registry_location("/srv/c") == "/srv/c"


def test_no_registry_at_all_says_what_to_do():
    with pytest.raises(InputError) as caught:
        settings.registry_location(None)

    assert "LORAHUB_REGISTRY" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["default = 3", "default = false", "x = 1", "= bad", 'registries = "a"']
)
def test_a_broken_config_is_named(home, text):
    (home / "config.toml").write_text(text)

    with pytest.raises(InputError) as caught:
        settings.registry_location(None)

    assert "config.toml" in caught.value.where


def test_a_misspelt_switch_is_refused(monkeypatch):
    monkeypatch.setenv("LORAHUB_TRUST", "stict")

    with pytest.raises(InputError, match="stict"):
        settings.is_strict()


def test_a_user_that_does_not_exist_has_no_folder(monkeypatch):
    monkeypatch.setenv("LORAHUB_CACHE", "~no-such-user/cache")

    with pytest.raises(InputError, match="no such user"):
        settings.cache_folder()


def test_a_relative_folder_of_the_config_lies_beside_it(home):
    (home / "config.toml").write_text('[registries]\nteam = "adapters"\nfar = "s3://a/b"\n')

    assert settings.registry_location("team") == str(home / "adapters")
    assert settings.registry_location("far") == "s3://a/b"


def test_a_registry_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    assert settings.registry_location("~/adapters") == "/home/me/adapters"
