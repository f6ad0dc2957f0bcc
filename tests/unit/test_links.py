"""Links out of a folder are told from those within it and within a download cache."""

import pytest

from lora_hub.links import leads_out


@pytest.fixture
def cache(tmp_path):
    """A repository in a cache as huggingface_hub lays it out; return its snapshot."""
    repo = tmp_path / "hub/models--tiny-lab--verse"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs/abc").touch()
    snapshot = repo / "snapshots/0123"
    (snapshot / "adapter").mkdir(parents=True)
    return snapshot


def test_a_file_and_a_link_within_the_folder_stay(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "to-itself").symlink_to("to-itself")

    assert not leads_out(tmp_path / "file", tmp_path)
    assert not leads_out(tmp_path / "link", tmp_path)
    assert not leads_out(tmp_path / "to-itself", tmp_path)
    assert not leads_out(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize("to", ["../secret", "/etc/passwd", "../gone", "sub/../../secret"])
def test_a_link_to_elsewhere_leads_out_whether_or_not_a_file_is_there(to, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(to)

    assert leads_out(folder / "link", folder)


def test_a_file_below_a_linked_folder_leads_out(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/sub").symlink_to("../outside")

    assert leads_out(tmp_path / "folder/sub/file", tmp_path / "folder")


def test_a_folder_named_by_a_link_is_the_folder_it_names(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to("folder")

    assert not leads_out(tmp_path / "link/file", tmp_path / "link")


def test_links_into_the_blobs_of_a_cache_stay(cache):
    (cache / "config.json").symlink_to("../../blobs/abc")
    (cache / "adapter/config.json").symlink_to("../../../blobs/abc")

    assert not leads_out(cache / "config.json", cache)
    assert not leads_out(cache / "adapter/config.json", cache / "adapter")


def test_links_from_a_cache_to_elsewhere_lead_out(cache, tmp_path):
    (tmp_path / "hub/secret").touch()
    (cache / "a").symlink_to("../../../secret")
    (cache / "b").symlink_to("../../blobs/../../secret")

    assert leads_out(cache / "a", cache)
    assert leads_out(cache / "b", cache)
