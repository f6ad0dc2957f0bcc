import pytest

from lora_hub.validation.places import Place, place_of

CASES = {
    "a file below the root": (
        ("ads/verse/lorahub.json", "ads/verse"),
        Place("ads/verse/lorahub.json"),
    ),
    "a pointer": (
        ("ads/verse/lorahub.json#/base/root", "ads/verse"),
        Place("ads/verse/lorahub.json", "/base/root"),
    ),
    "a tensor": (
        ("ads/verse/w.safetensors: a.b.lora_A", "ads/verse"),
        Place("ads/verse/w.safetensors", "a.b.lora_A"),
    ),
    "the folder itself": (("ads/verse", "ads/verse"), Place("ads/verse")),
    "the root": (("./lorahub.json", "."), Place("lorahub.json")),
    "the root itself": ((".", "."), Place(".")),
    "somewhere else": (
        ("/srv/secret/verse/lorahub.json", "/srv/secret/verse"),
        Place("verse/lorahub.json"),
    ),
    "an absolute path below the root": (("{root}/a/b", "{root}/a"), Place("a/b")),
    "a package of a registry": (
        ("style/verse@1.0.0/README.md", "registry"),
        Place("registry", "style/verse@1.0.0/README.md"),
    ),
    "a name that begins alike": (
        ("ads/verse-2/x", "ads/verse"),
        Place("ads/verse", "ads/verse-2/x"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_place_is_told_from_the_root(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (where, subject), expected = CASES[case]

    found = place_of(where.format(root=tmp_path), subject.format(root=tmp_path))

    assert found == expected
