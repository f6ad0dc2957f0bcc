"""Packages whose manifest lies, or cannot be read in one way alone.

Where nothing else is said the manifest is rewritten in canonical form and the package
signed anew with the example key: the author himself is the liar.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.hostile.case import (
    CONFIG,
    SECRET,
    TARGET,
    WEIGHTS,
    config,
    entries,
    key,
    numbers,
    rows,
    safetensors,
)
from tests.conformance.hostile.folders import HEAD, POINTER, link, pickled, zipped

MANIFEST = "lorahub.json"


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sealed(package: Path) -> None:
    """Sign what lies in the package."""
    from tests import packages

    packages.sign_folder(package, key())


def stated(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return the builder of a package whose manifest `change` alters."""

    def build(folder: Path) -> None:
        from lora_hub import canonical

        path = folder / "package" / MANIFEST
        manifest = json.loads(path.read_bytes())
        change(manifest)
        path.write_bytes(canonical.encode(manifest))
        sealed(folder / "package")

    return build


def at(*path: str | int, value: Any) -> Callable[[Path], None]:
    """Return the builder of a package with one value of its manifest changed."""

    def change(manifest: Any) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = value

    return stated(change)


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return the builder of a package whose manifest's bytes `change` alters."""

    def build(folder: Path) -> None:
        path = folder / "package" / MANIFEST
        path.write_bytes(change(path.read_bytes()))
        sealed(folder / "package")

    return build


def holding(**files: bytes) -> Callable[[Path], None]:
    """Return the builder of a package with other files, listed as they are."""
    names = {"config": CONFIG, "weights": WEIGHTS, "tokenizer": "tokenizer_config.json"}
    roles = {names.get(role, "README.md"): role for role in files}
    contents = {names.get(role, "README.md"): data for role, data in files.items()}

    def change(manifest: dict[str, Any]) -> None:
        listed = {file["path"]: file for file in manifest["files"]}
        for name, data in contents.items():
            entry = {"path": name, "role": roles[name], "size": len(data)}
            listed[name] = entry | {"sha256": sha256(data)}
        manifest["files"] = [listed[name] for name in sorted(listed)]

    def build(folder: Path) -> None:
        for name, data in contents.items():
            (folder / "package" / name).write_bytes(data)
        stated(change)(folder)

    return build


def listing(path: str, role: str = "license", data: bytes = b"") -> Callable[[Path], None]:
    """Return the builder of a package that lists one more file, which is not there."""
    file = {"path": path, "role": role, "size": len(data), "sha256": sha256(data)}
    return stated(lambda manifest: manifest["files"].append(file))


def escaping(folder: Path) -> None:
    """List a file outside of the package with its true size and digest."""
    (folder / "outside").mkdir()
    (folder / "outside/LICENSE").write_text(SECRET)
    listing("../outside/LICENSE", data=SECRET.encode())(folder)


def put(name: str, data: bytes = b"") -> Callable[[Path], None]:
    """Return the builder of a package with a file that is not listed."""

    def build(folder: Path) -> None:
        (folder / "package" / name).write_bytes(data)

    return build


def changed(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return the builder of a package in which one file is changed."""
    return lambda folder: change(folder / "package" / name)


def made(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return the builder of a package in which `make` puts something in a file's place."""

    def build(folder: Path) -> None:
        path = folder / "package" / name
        path.unlink(missing_ok=True)
        make(path)

    return build


def grown(folder: Path) -> None:
    """Let the weights be 60 GB of hole, and the manifest say so."""
    with open(folder / "package" / WEIGHTS, "ab") as stream:
        stream.truncate(60 * 10**9)

    def change(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            if file["path"] == WEIGHTS:
                file["size"] = 60 * 10**9

    from lora_hub import canonical

    path = folder / "package" / MANIFEST
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(canonical.encode(manifest))


def flip(path: Path) -> None:
    """Change one bit at the end of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def hole(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(60 * 10**9)


MODULE = ("adapter", "modules", 0)
FULL = safetensors(entries() | HEAD, numbers() + bytes(256))
SAVED = json.dumps(config(modules_to_save=["lm_head"])).encode()
MORE = json.dumps(config(target_modules=["q_proj", "o_proj"])).encode()

CASES = (
    *rows(
        "package",
        "validate: LH001",
        "25 duplicate keys",
        (
            "manifest with a name twice",
            text(lambda data: data.replace(b'"name":', b'"name":"style/good","name":', 1)),
            "stands twice",
        ),
        (
            "manifest with a digest twice",
            text(lambda data: data.replace(b'"sha256":', b'"sha256":"x","sha256":', 1)),
            "stands twice",
        ),
    ),
    *rows(
        "package",
        "validate: LH001",
        "2 manifest",
        (
            "manifest of a major version to come",
            at("manifest_version", value="2.0"),
            "'2.0'",
        ),
        ("manifest of version zero", at("manifest_version", value="0.9"), "'0.9'"),
        (
            "manifest without a version",
            stated(lambda manifest: manifest.pop("manifest_version")),
            "manifest_version",
        ),
        (
            "manifest version as a number",
            at("manifest_version", value=1),
            "manifest_version",
        ),
        (
            "manifest with NaN",
            text(lambda data: data.replace(b'"alpha":4', b'"alpha":NaN', 1)),
            "no JSON number",
        ),
        (
            "manifest with a byte order mark",
            text(lambda data: b"\xef\xbb\xbf" + data),
            "JSON",
        ),
        (
            "manifest that is not UTF-8",
            text(lambda data: data.replace(b"tiny", b"\xff")),
            "not UTF-8",
        ),
        ("manifest that is an LFS pointer", text(lambda data: POINTER), "Git LFS pointer"),
        ("manifest that is a list", text(lambda data: b"[" + data + b"]"), "an object"),
    ),
    *rows(
        "package",
        "validate: LH001",
        "28 floods",
        (
            "manifest nested a hundred thousand deep",
            text(lambda data: b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
            "levels",
        ),
        (
            "manifest of five megabytes",
            text(lambda data: data + b" " * 5_000_000),
            "are read",
        ),
        ("manifest of 60 GB, all hole", made(MANIFEST, hole), "are read"),
        (
            "manifest with a number of five thousand digits",
            text(lambda data: data.replace(b'"alpha":4', b'"alpha":' + b"9" * 5000, 1)),
            "digits",
        ),
    ),
    *rows(
        "package",
        "validate: LH003",
        "2 manifest",
        (
            "manifest with a space too many",
            text(lambda data: data.replace(b":", b": ", 1)),
            "canonical",
        ),
        (
            "manifest with an escape too many",
            text(lambda data: data.replace(b"tiny", b"\\u0074iny")),
            "canonical",
        ),
    ),
    *rows(
        "package",
        "validate: LH002",
        "19 names and paths",
        ("name that leaves the registry", at("name", value="style/../../etc"), "#/name"),
        ("name in letters that look alike", at("name", value="style/t\u0456ny"), "#/name"),
        ("name with a terminal escape", at("name", value="style/\x1b[2Jtiny"), "#/name"),
        (
            "summary with a terminal escape",
            at("summary", value="\x1b]0;o\x07"),
            "#/summary",
        ),
        ("version that is a path", at("version", value="1.0.0/../../x"), "#/version"),
        (
            "digest that is a path",
            at("files", 0, "sha256", value="sha256:../../etc/passwd"),
            "#/files/0",
        ),
    ),
    *rows(
        "package",
        "validate: LH002",
        "27 numbers that are none",
        ("size below zero", at("files", 0, "size", value=-1), "#/files/0/size"),
        ("size that is a text", at("files", 0, "size", value="64"), "#/files/0/size"),
        ("size with a point", at("files", 0, "size", value=0.5), "#/files/0/size"),
        ("rank of zero", at(*MODULE, "rank", value=0), "rank"),
        ("rank that is true", at(*MODULE, "rank", value=True), "rank"),
    ),
    *rows(
        "package",
        "validate: LH002",
        "19 names and paths",
        ("file list that leaves the package", escaping, "#/files/3/path"),
        *(
            (f"file list with {what}", listing(path), "#/files/3/path")
            for what, path in (
                ("an absolute path", "/etc/passwd"),
                ("a backslash", "..\\LICENSE"),
                ("a drive", "C:LICENSE"),
                ("a percent escape", "%2e%2e%2fLICENSE"),
                ("NUL", "LICENSE\0.md"),
                ("a space at the end", "LICENSE "),
                ("a name in other letters", "LICENS\u0415"),
                ("a stream of Windows", "LICENSE:evil"),
                ("a name of 2000 characters", "LICENSE-" + "x" * 2000),
                ("a file in a folder", "more/LICENSE"),
                ("a hidden name", ".LICENSE"),
                ("an empty name", ""),
            )
        ),
    ),
    *rows(
        "package",
        "validate: LH005",
        "19 names and paths",
        ("file list with a dot at the end", listing("LICENSE."), "no name for a file"),
        ("file list with a device of Windows", listing("NUL.md"), "a device on Windows"),
        ("file list with two names alike but for case", listing("readme.md"), "case alone"),
        (
            "file list that names Python code",
            listing("modeling.py"),
            "no part of a package",
        ),
        (
            "file list that names a pickle",
            listing("adapter_model.bin", "weights"),
            "no part of a package",
        ),
        (
            "file list that names itself",
            listing(MANIFEST, "config"),
            "no part of a package",
        ),
        (
            "file list with a thousand licences",
            stated(
                lambda manifest: manifest["files"].extend(
                    {
                        "path": f"LICENSE-{number}",
                        "role": "license",
                        "size": 0,
                        "sha256": sha256(b""),
                    }
                    for number in range(1000)
                )
            ),
            "at most 255",
        ),
        ("file listed twice", listing("README.md", "card"), "listed twice"),
        (
            "weights listed as a card",
            at("files", 1, "role", value="card"),
            "is listed as card",
        ),
    ),
    *rows(
        "package",
        "validate: LH005",
        "33 hidden payload",
        (
            "weights that are not listed",
            stated(lambda manifest: manifest["files"].pop(1)),
            "not listed",
        ),
        (
            "base tensor of another shape",
            at("base", "targets", 0, "shape", value=[8, 8]),
            "the base's weight is",
        ),
        (
            "base tensor that nothing changes",
            stated(
                lambda manifest: manifest["base"]["targets"].append(
                    manifest["base"]["targets"][0] | {"module": "lm_head"}
                )
            ),
            "lm_head",
        ),
        (
            "module listed twice",
            stated(
                lambda manifest: manifest["adapter"]["modules"].append(
                    manifest["adapter"]["modules"][0]
                )
            ),
            TARGET,
        ),
    ),
    *rows(
        "package",
        "validate: LH022",
        "33 hidden payload",
        (
            "rank that is not the weights'",
            stated(
                lambda manifest: manifest["adapter"].update(
                    modules=[
                        manifest["adapter"]["modules"][0]
                        | {"rank": 1, "a": [1, 4], "b": [4, 1]}
                    ]
                )
            ),
            "the files say",
        ),
        (
            "alpha that is not the config's",
            at(*MODULE, "alpha", value=400.0),
            "the files say",
        ),
        (
            "scaling rule that is not the config's",
            at(*MODULE, "scaling", value="alpha/sqrt(r)"),
            "the files say",
        ),
        (
            "dtype that is not the weights'",
            at(*MODULE, "dtype", value="BF16"),
            "the files say",
        ),
        (
            "target that is not the weights'",
            stated(
                lambda manifest: (
                    manifest["adapter"]["modules"][0].update(module="lm_head"),
                    manifest["base"]["targets"][0].update(module="lm_head"),
                )
            ),
            "lm_head",
        ),
        (
            "target in the weights that is not listed",
            holding(
                config=MORE,
                weights=safetensors(
                    entries()
                    | {
                        name.replace("q_proj", "o_proj"): entry
                        | {
                            "data_offsets": [
                                64 + offset for offset in entry["data_offsets"]
                            ]
                        }
                        for name, entry in entries().items()
                    },
                    numbers() * 2,
                ),
            ),
            "o_proj",
        ),
        (
            "summary that promises a lower rank",
            at("adapter", "summary", "max_rank", value=1),
            "the files say",
        ),
        (
            "summary that names other targets",
            at("adapter", "summary", "target_names", value=["v_proj"]),
            "the files say",
        ),
    ),
    *rows(
        "package",
        "validate: LH022",
        "33 hidden payload",
        (
            "whole head that the manifest does not list",
            holding(config=SAVED, weights=FULL),
            "lm_head",
        ),
    ),
    *rows(
        "package",
        "validate: LH010",
        "1 changed bytes",
        (
            "digest that is not the file's",
            at("files", 1, "sha256", value=sha256(b"")),
            "digest",
        ),
        ("size that is not the file's", at("files", 1, "size", value=10), "bytes"),
        ("weights of 60 GB, all hole, as the manifest says", grown, "are read"),
    ),
    *rows(
        "package",
        "validate: LH011",
        "1 changed bytes",
        ("listed file that is missing", listing("LICENSE"), "missing"),
    ),
    *rows(
        "package",
        "validate: LH012",
        "4 extra files",
        ("file that is not listed", put("extra.json", b"{}"), "does not list it"),
        (
            "pickle that is not listed",
            put("optimizer.pt", b"\x80\x04."),
            "does not list it",
        ),
        (
            "code that is not listed",
            put("modeling_evil.py", b"raise SystemExit"),
            "not list",
        ),
        (
            "second weights that are not listed",
            put("adapter_model.bin"),
            "does not list it",
        ),
        ("file whose name steers the terminal", put("\x1b[2Jx.json"), "does not list it"),
        ("file whose name runs backwards", put("x\u202egpj.exe"), "does not list it"),
    ),
    *rows(
        "package",
        "validate: LH012",
        "20 links and devices",
        ("package with a link for its weights", made(WEIGHTS, link), "symbolic link"),
        ("package with a link for its card", made("README.md", link), "symbolic link"),
        ("package with a link for its manifest", made(MANIFEST, link), "symbolic link"),
        (
            "package with a named pipe",
            made("README.md", lambda path: __import__("os").mkfifo(path)),
            "named pipe",
        ),
        ("package with a folder", made("more", Path.mkdir), "folder"),
        (
            "package with a link to a folder",
            made("more", lambda path: path.symlink_to("../outside")),
            "symbolic link",
        ),
    ),
    *rows(
        "package",
        "validate: LH014",
        "45 text that steers",
        (
            "summary that runs backwards",
            at("summary", value="safe \u202eexe.txt"),
            "U+202E",
        ),
        (
            "author with a terminal escape",
            at("authors", value=[{"name": "\x9b2J"}]),
            "U+009B",
        ),
        (
            "key below ext that runs backwards",
            at("ext", value={"tool": {"\u2067k": 1}}),
            "U+2067",
        ),
        (
            "card of a package with a terminal escape",
            holding(card=b"# \x1b[2J\n"),
            "U+001B",
        ),
    ),
    *rows(
        "package",
        "validate: LH020",
        "22 pickles",
        (
            "pickle listed as the weights",
            holding(weights=pickled(4)),
            "a Python pickle",
        ),
        (
            "archive listed as the weights",
            holding(weights=zipped()),
            "zip archive",
        ),
    ),
    *rows(
        "package",
        "validate: LH030",
        "30 NaN and infinity",
        (
            "package with a NaN in its weights",
            holding(weights=safetensors(entries(), b"\0\0\xc0\x7f" + numbers()[4:])),
            "1 of 8",
        ),
    ),
    *rows(
        "package",
        "validate: LH081",
        "23 remote code",
        (
            "tokenizer in a package that names code to run",
            holding(tokenizer=b'{"auto_map":{"AutoTokenizer":["evil.T",null]}}'),
            "auto_map",
        ),
    ),
    *rows(
        "package",
        "inspect: IntegrityError",
        "33 hidden payload",
        (
            "rank that inspect must not believe",
            stated(
                lambda manifest: manifest["adapter"].update(
                    modules=[manifest["adapter"]["modules"][0] | {"alpha": 1.0}]
                )
            ),
            "the files say",
        ),
    ),
    *rows(
        "package",
        "convert: IntegrityError",
        "1 changed bytes",
        (
            "weights changed before they are converted",
            changed(WEIGHTS, flip),
            "digest",
        ),
    ),
    *rows(
        "package",
        "sign: IntegrityError",
        "4 extra files",
        ("file that somebody wants to be signed along", put("extra.json"), "was added"),
    ),
)
