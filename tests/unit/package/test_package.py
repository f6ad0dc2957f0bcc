import json
import shutil

import msgspec
import pytest

from lora_hub import canonical
from lora_hub.errors import DocumentError, FormatError, IntegrityError, LoraHubError
from lora_hub.manifest import codec
from lora_hub.package.package import (
    check_complete,
    check_manifest,
    hold,
    load_source,
    open_package,
    read_package,
)
from lora_hub.signing import keys
from tests.builders import sign_package, tiny_manifest, tiny_package


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_package(tmp_path_factory.mktemp("package") / "verse")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "verse")


def test_opening_reads_the_manifest_alone(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")

    package = open_package(folder)

    assert package.manifest.name == "tiny-lab/verse"
    assert package.names == tuple(sorted(path.name for path in folder.iterdir()))


def test_source_is_read_from_checked_bytes(folder):
    source = load_source(open_package(folder))

    assert len(source.updates) == 4


def test_a_held_package_was_read_once_and_is_read_no_more(folder):
    opened, asked = open_package(folder), []

    def read(name):
        asked.append(name)
        return opened.read(name)

    held = hold(read_package(read, opened.names, where="here"))
    load_source(held)

    assert sorted(asked) == list(opened.names)
    assert {name: held.read(name) for name in held.names} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors"])
def test_a_package_that_was_changed_cannot_be_held(name, folder):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(IntegrityError, match="the bytes have digest") as error:
        hold(open_package(folder))

    assert error.value.where == str(folder / name)


def test_a_compared_file_still_has_the_size_that_the_manifest_says(folder):
    opened = open_package(folder)
    compared = read_package(
        lambda name: opened.read(name) + b" " * (name == "README.md"),
        opened.names,
        where="here",
        is_compared=True,
    )

    with pytest.raises(IntegrityError, match="the manifest says"):
        hold(compared)


@pytest.mark.parametrize(
    "name", ["README.md", "adapter_config.json", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_changed_byte_of_any_file_is_found_by_its_name(name, place, folder):
    data = bytearray((folder / name).read_bytes())
    data[int(len(data) * place) if place != -1 else -1] ^= 1
    (folder / name).write_bytes(data)

    with pytest.raises(IntegrityError, match="the bytes have digest") as error:
        open_package(folder).read_checked(name)

    assert error.value.where.endswith(name)


def test_file_of_another_length_is_found(folder):
    (folder / "README.md").write_text("short")

    with pytest.raises(IntegrityError, match="has 5 bytes, the manifest says"):
        open_package(folder).read_checked("README.md")


def test_missing_and_added_files_are_found_by_name(folder):
    package = open_package(folder)
    check_complete(package)

    (folder / "extra.py").touch()
    with pytest.raises(IntegrityError, match="added") as error:
        check_complete(open_package(folder))
    assert error.value.where.endswith("extra.py")

    (folder / "README.md").unlink()
    with pytest.raises(IntegrityError, match="missing") as error:
        check_complete(open_package(folder))
    assert error.value.where.endswith("README.md")
    with pytest.raises(IntegrityError, match="missing"):
        open_package(folder).read_checked("README.md")


def test_file_that_is_not_listed_is_never_read(folder):
    (folder / "extra.json").touch()

    with pytest.raises(IntegrityError, match="does not list"):
        open_package(folder).read_checked("extra.json")


def test_folder_without_a_manifest_is_no_package(folder):
    (folder / "lorahub.json").unlink()

    with pytest.raises(FormatError, match=r"there is no lorahub\.json"):
        open_package(folder)


def test_any_byte_of_a_signed_manifest_that_makes_it_unreadable_is_tampering(folder):
    sign_package(folder, keys.generate())
    data = (folder / "lorahub.json").read_bytes()
    errors = []
    for place in range(0, len(data), 97):
        (folder / "lorahub.json").write_bytes(
            data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        )
        try:
            # May succeed: then the signature over the manifest's digest is wrong.
            open_package(folder)
        except LoraHubError as error:
            errors.append(error)

    assert errors
    assert {type(error) for error in errors} == {IntegrityError}
    assert all("changed after signing" in error.problem for error in errors)


def test_unsigned_manifest_that_is_broken_is_bad_input(folder):
    (folder / "lorahub.json").write_bytes(b"{")

    with pytest.raises(DocumentError, match="not JSON"):
        open_package(folder)


def rewritten(folder, change):
    path = folder / "lorahub.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(canonical.encode(value))
    return folder


def set_alpha(value):
    value["adapter"]["modules"][0]["alpha"] = 400


def drop_module(value):
    del value["adapter"]["modules"][0]
    del value["base"]["targets"][0]


def set_rank(value):
    value["adapter"]["summary"]["max_rank"] = 1


def set_kind(value):
    value["kind"] = "rslora"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_alpha, "alpha=400.0"),
        (drop_module, "which the manifest does not list"),
        (set_rank, "max_rank=1"),
        (set_kind, "says 'rslora', the files say 'lora'"),
    ],
)
def test_manifest_that_says_other_things_than_the_weights_is_refused(
    change, problem, folder
):
    package = open_package(rewritten(folder, change))

    with pytest.raises(IntegrityError) as error:
        load_source(package)

    assert problem in error.value.problem


def manifest_with(**changes):
    return msgspec.structs.replace(tiny_manifest(), **changes)


def file(path, role, **changes):
    return msgspec.structs.replace(
        tiny_manifest().files[0], path=path, role=role, **changes
    )


def test_sound_manifest_passes():
    check_manifest(tiny_manifest(), where="m")


CONTRADICTIONS = [
    (manifest_with(name="a--b/xy"), "a name is namespace/name"),
    (manifest_with(name="con/xy"), "cannot be a folder name on Windows"),
    (
        manifest_with(files=(*tiny_manifest().files, file("readme.MD", "card"))),
        "no part of a package",
    ),
    (
        manifest_with(files=(*tiny_manifest().files, file("LICENSE", "card"))),
        "is listed as card, a file of this name is license",
    ),
    (
        manifest_with(files=(*tiny_manifest().files, *tiny_manifest().files[:1])),
        "is listed twice",
    ),
    (manifest_with(files=tiny_manifest().files[:1]), "'adapter_model.safetensors' is not"),
    (
        manifest_with(files=(*tiny_manifest().files, file("lorahub.json", "config"))),
        "no part of a package",
    ),
]


@pytest.mark.parametrize(("manifest", "problem"), CONTRADICTIONS)
def test_manifest_that_contradicts_itself_is_refused(manifest, problem):
    with pytest.raises(DocumentError) as error:
        check_manifest(manifest, where="m")

    assert problem in error.value.problem


def test_targets_of_the_base_are_the_modules_of_the_adapter():
    manifest = tiny_manifest()
    target = manifest.base.targets[0]
    other = msgspec.structs.replace(target, module="other")
    wide = msgspec.structs.replace(target, shape=(16, 99))
    for targets, problem in (
        ((target, target), "listed twice"),
        ((other,), "is not among the base's targets"),
        ((target, other), "nothing in the adapter modifies other"),
        ((wide,), "the base's weight is"),
    ):
        base = msgspec.structs.replace(manifest.base, targets=targets)
        with pytest.raises(DocumentError, match=problem):
            check_manifest(manifest_with(base=base), where="m")


def test_bytes_of_the_manifest_are_kept_as_received(folder):
    package = open_package(folder)

    assert package.manifest_bytes == (folder / "lorahub.json").read_bytes()
    assert codec.encode(package.manifest) == package.manifest_bytes
