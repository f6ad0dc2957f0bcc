"""The packaging half as users call it: paths and names in, plain values out. No torch.

Each function is what one command does; `cli/` prints what these return.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub import atomic, settings
from lora_hub.errors import InputError, TrustError
from lora_hub.public.keys import read_key

if TYPE_CHECKING:
    from lora_hub.formats.dialect import ScaleFrom
    from lora_hub.manifest.document import BaseHint
    from lora_hub.package.pack import PackPlan
    from lora_hub.package.package import Package
    from lora_hub.validation.findings import Checked, Finding

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """Which base a folder holds; `tensors` is name → digest, filled when asked for."""

    root: str
    struct: str
    count: int
    size_bytes: int
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Signed:
    """A package and the key that signed it.

    Attributes:
        package: the package digest.
        fingerprint: of the key.
        files: name → digest of every file the signature covers.
    """

    package: str
    fingerprint: str
    files: Mapping[str, str]


def fingerprint(base: PathLike, *, tensors: bool = False) -> BaseFingerprint:
    """Return which base a checkpoint folder holds.

    Raises:
        InputError: the folder is no checkpoint, and no pipeline, of safetensors files.
    """
    from lora_hub.base.pipeline import open_base
    from lora_hub.base.view import root_of, struct_of

    with open_base(Path(base), settings.cache_folder() / "bases") as view:
        root = root_of(view)
        assert root is not None  # None is for tensors asked in another dtype
        names = sorted(view.tensors) if tensors else ()
        return BaseFingerprint(
            root=root,
            struct=struct_of(view),
            count=len(view.tensors),
            size_bytes=view.size_bytes,
            tensors={name: view.digest(name) or "" for name in names},
        )


def plan(
    src: PathLike,
    *,
    name: str,
    version: str,
    base: PathLike,
    task: str,
    license: str,  # noqa: A002 - the manifest's word
    summary: str = "",
    authors: Sequence[str] = (),
    languages: Sequence[str] = (),
    hints: Sequence[str] = (),
    base_license: str | None = None,
    extra: Mapping[str, Any] | None = None,
    from_: str | None = None,
    scale_from: "ScaleFrom | None" = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    initial: PathLike | None = None,
) -> "PackPlan":
    """Return the package that `pack` would write; see there."""
    from lora_hub.formats.dialect import ReadOptions
    from lora_hub.manifest.document import Author
    from lora_hub.package.pack import plan_package

    return plan_package(
        Path(src),
        name=name,
        version=version,
        base=Path(base),
        task=task,
        license=license,
        summary=summary,
        authors=[Author(name=author) for author in authors],
        languages=languages,
        hints=[_hint(text) for text in hints],
        base_license=base_license,
        extra=extra,
        digest_cache=settings.cache_folder() / "bases",
        options=ReadOptions(
            scale_from=scale_from,
            alpha=alpha,
            enable_lora=None if enable_lora is None else tuple(enable_lora),
            initial=None if initial is None else Path(initial),
        ),
        dialect=_dialect(from_),
    )


def pack(src: PathLike, *, out: PathLike, **fields: Any) -> "Package":
    """Make the package folder `out` from an adapter folder and its base.

    Args:
        src: an adapter's folder, in any dialect that is read.
        out: a folder that does not exist yet.
        **fields: name, version, base, task and license, which every package has; summary,
            authors, languages, hints ("hub:name[@revision]"), base_license and extra
            (further fields of the manifest), which it may have. See `plan_package`.
            What the files leave open: from_ (the dialect), scale_from, alpha, enable_lora
            and initial as in `convert`.

    Raises:
        InputError: something in the folder or the fields cannot be packed; the message
            names it.
        FitError: the adapter was not made for this base.
        StoreError: `out` is taken or cannot be written.
    """
    from lora_hub.package.pack import write_package

    return write_package(plan(src, **fields), Path(out))


def sign(package: PathLike, key: PathLike) -> Signed:
    """Write `model.sig` into the package folder: a signature over every file of it.

    Args:
        package: a package folder.
        key: the file of a private key, as `keygen` makes it.

    Raises:
        IntegrityError: the folder is not what its manifest says; nothing is signed.
        InputError: the key cannot be read.
    """
    from lora_hub.package.package import check_complete, open_package
    from lora_hub.registry.verify import digests_of
    from lora_hub.signing import keys
    from lora_hub.signing.sign import sign as sign_files
    from lora_hub.signing.statement import SIGNATURE_NAME

    folder = Path(package)
    opened = open_package(folder)
    check_complete(opened)
    private = keys.private_key(read_key(key), where=str(key))
    files = digests_of(opened)
    bundle = sign_files(files, subject=opened.manifest.name.partition("/")[2], key=private)
    atomic.replace(folder / SIGNATURE_NAME, [bundle])
    return Signed(opened.digest, keys.fingerprint(private), files)


def verify(package: PathLike, key: PathLike | None = None) -> Signed:
    """Check the signature of a package folder and every byte it covers.

    Args:
        package: a package folder.
        key: the file of the public key to trust; without it the keys pinned for the
            package's namespace decide.

    Raises:
        TrustError: not signed, signed by another key, or no key is trusted.
        IntegrityError: a file was changed, added or removed after signing.
    """
    from lora_hub.package.package import open_package
    from lora_hub.registry.verify import digests_of, verify_package

    opened = open_package(Path(package))
    keys = [read_key(key)] if key else _pinned(opened.manifest.name)
    signer = verify_package(opened, keys)
    return Signed(opened.digest, signer.fingerprint, digests_of(opened))


def validate(
    *paths: PathLike, waivers: PathLike | None = None, **how: Any
) -> "tuple[Finding, ...]":
    """Return what is wrong with packages, adapter folders and registries; nothing is raised
    for what is found.

    Args:
        paths: each one of these, a folder of them, or a file in one.
        waivers: see `check`.
        **how: from_, scale_from, alpha, enable_lora, initial and base, see `check`.

    Raises:
        InputError: a path does not exist, or the waivers cannot be read.
    """
    checked = check(*paths, waivers=waivers, **how)
    return tuple(one for each in checked for one in each.findings)


def check(
    *paths: PathLike,
    waivers: PathLike | None = None,
    from_: str | None = None,
    scale_from: "ScaleFrom | None" = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    initial: PathLike | None = None,
    base: PathLike | None = None,
    processes: int = 1,
) -> "tuple[Checked, ...]":
    """Return what `validate` does, for each thing that was checked; the waivers' own
    findings come last.

    Args:
        paths: see `validate`.
        waivers: a file as `validation/waivers.py` describes it; without it,
            `lorahub-waivers.toml` in the working directory, unless that is in what is
            checked.
        from_: the dialect of bare adapter folders, where two could be meant.
        scale_from: which number holds where an MLX config has both: "alpha", "scale".
        alpha: the `lora_alpha` of loralib files.
        enable_lora: loralib's, which parts of a merged layer (q, k and v) are adapted.
        initial: folder of the factors before training (PiSSA, OLoRA, CorDA).
        base: folder of the base of bare adapters, for dialects that need its names.
        processes: how many share the work; see `validation/run.py`.
    """
    from lora_hub.formats.dialect import ReadOptions
    from lora_hub.validation.run import check_all
    from lora_hub.validation.waivers import apply, not_believed, own, read_waivers

    given = [Path(path) for path in paths]
    options = ReadOptions(
        base=None if base is None else Path(base),
        scale_from=scale_from,
        alpha=alpha,
        enable_lora=None if enable_lora is None else tuple(enable_lora),
        initial=None if initial is None else Path(initial),
    )
    checked = check_all(
        given, processes=processes, options=options, dialect=_dialect(from_)
    )
    places = [*given, *(Path(each.subject) for each in checked)]
    files = own(places) if waivers is None else (Path(waivers),)
    decisions = [waiver for file in files for waiver in read_waivers(file)]
    decided = apply(checked, decisions, today=datetime.now(UTC).date())
    return (*decided, *not_believed(places, files))


def fix(*paths: PathLike) -> tuple[str, ...]:
    """Mend what can be mended mechanically in bare adapter folders at and below the paths;
    return what was changed, in words. Packages and registries are never touched.

    Raises:
        StoreError: a file cannot be written; it is then as it was.
    """
    from lora_hub.validation.fix import fix_folder
    from lora_hub.validation.run import subjects

    folders = subjects([Path(path) for path in paths])
    return tuple(change for folder in folders for change in fix_folder(folder))


def _dialect(name: str | None) -> str | None:
    from lora_hub.formats.detect import DIALECTS

    if name is not None and name not in DIALECTS:
        raise InputError(f"{name!r} is no dialect", hint=f"dialects: {', '.join(DIALECTS)}")
    return name


def _hint(text: str) -> "BaseHint":
    from lora_hub.manifest.document import BaseHint

    hub, colon, name = text.partition(":")
    repo, _, revision = name.partition("@")
    if not (colon and hub and repo):
        raise InputError(
            "a hint where the base is found is HUB:NAME[@REVISION]",
            where=repr(text),
            hint="for example hf:HuggingFaceTB/SmolLM2-135M-Instruct@<commit>",
        )
    return BaseHint(hub=hub, repo=repo, revision=revision or None)


def _pinned(full_name: str) -> Sequence[bytes]:
    from lora_hub.registry.trust import TrustStore

    namespace = full_name.partition("/")[0]
    pin = TrustStore().get(namespace)
    if pin is None:
        raise TrustError(
            f"no key is trusted for the namespace {namespace!r}",
            where=full_name,
            hint=f"give --key FILE.pub, or `lorahub trust add {namespace} FILE.pub`",
        )
    return pin.public_keys
