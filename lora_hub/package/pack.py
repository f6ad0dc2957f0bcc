"""A folder as PEFT saves it, and the base it was made for → a package.

`plan_package` decides everything: the manifest and the bytes of every file. `write_package`
puts them into a folder that is there whole or not. The same input gives the same bytes:
names are sorted, JSON is canonical, tensors are copied and never converted, and the time
is that of SOURCE_DATE_EPOCH where it is set.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lora_hub import atomic, canonical, clock, digest, refs
from lora_hub.base.fit import check_structure
from lora_hub.base.folder import FolderBase, describe
from lora_hub.errors import InputError
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest import codec
from lora_hub.manifest.document import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Author,
    Base,
    BaseHint,
    File,
    Manifest,
)
from lora_hub.manifest.tasks import TASKS
from lora_hub.package import contents, derived, layout, spdx
from lora_hub.package.card import write_card
from lora_hub.package.contents import Chunks
from lora_hub.package.layout import CARD_NAME, TEMPLATE_NAME
from lora_hub.package.package import Package, check_manifest, open_package

# What an author may state beyond the parameters of `plan_package`.
EXTRA_FIELDS = frozenset(
    {
        "evaluation",
        "ext",
        "homepage",
        "lineage",
        "prompt",
        "runtime",
        "source",
        "training",
    }
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A package before it is written.

    Attributes:
        files: name → content in pieces, in order of names, the manifest among them.
        left_out: what lies in the source and has no place in a package.
    """

    manifest: Manifest
    digest: str
    files: Mapping[str, Chunks]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Return what a dry run shows."""
        sizes = {name: sum(map(len, chunks)) for name, chunks in self.files.items()}
        width = len(f"{max(sizes.values())}")
        summary = self.manifest.adapter.summary
        targets = (
            f"{len(self.manifest.adapter.modules)} targets "
            f"({', '.join(summary.target_names)}), rank {summary.max_rank}, "
            f"{summary.parameters} parameters"
        )
        lines = [
            f"{self.manifest.name} {self.manifest.version}  {self.digest}",
            targets,
            f"for the base {self.manifest.base.root}",
            *(f"  {size:>{width}}  {name}" for name, size in sizes.items()),
            *(f"  left out: {name}" for name in self.left_out),
        ]
        return "\n".join(lines)


def plan_package(
    src: Path,
    *,
    name: str,
    version: str,
    base: Path,
    task: str,
    license: str,  # noqa: A002 - the manifest's word
    summary: str = "",
    authors: Sequence[Author] = (),
    hints: Sequence[BaseHint] = (),
    base_license: str | None = None,
    languages: Sequence[str] = (),
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
    created: str | None = None,
    digest_cache: Path | None = None,
) -> PackPlan:
    """Return the package that a folder makes, without writing anything.

    Args:
        src: an adapter's folder in a dialect of `formats/detect.py`.
        name: namespace/name.
        version: `refs.parse_version`.
        base: the checkpoint folder of the base the adapter was trained on.
        task: a task of `manifest/tasks.py`, with or without a free part behind a slash.
        license: SPDX expression of the adapter.
        summary: one line.
        authors: who made it.
        hints: where the base may be found; without any, what the adapter's own config
            calls it, if that is a name on a hub and no local path.
        base_license: SPDX expression of the base.
        languages: ISO 639 codes.
        card: text of the card; the source's README.md without.
        extra: further fields of the manifest, those of `EXTRA_FIELDS`.
        created: RFC 3339 in UTC; SOURCE_DATE_EPOCH or now without.
        digest_cache: where digests of the base are kept between runs.

    Raises:
        InputError: a field is not as the manifest wants it, or the source holds pickles;
            see `detect.open_adapter` for the rest.
        FitError: the base lacks a target, or has it in another shape.
    """
    refs.parse_name(name)
    refs.parse_version(version)
    _check_task(task)
    for expression in filter(None, (license, base_license)):
        spdx.check_license(expression)
    _check_extra(extra or {})
    source = open_adapter(src, ReadOptions(base=base))
    names = sorted(entry.name for entry in src.iterdir())
    contents.refuse_pickles(names, src)
    hints = tuple(hints) or _hints_of(source)
    _check_hints(hints)
    with FolderBase.open(base, digest_cache) as view:
        check_structure(source.updates, view)
        described = describe(view, [update.target for update in source.updates])
        base_tensors = frozenset(view.tensors)
    files = contents.weights_and_config(source, hints, base_tensors)
    files |= contents.copied(src, base, names)
    _check_license_text(license, files, src)
    files[CARD_NAME] = (
        write_card(
            full_name=name,
            summary=summary,
            license_expression=license,
            task=task,
            base_name=contents.hub_repo(hints),
            languages=languages,
            body=contents.readme(src, names) if card is None else card,
        ).encode(),
    )
    value = {
        **_prompt(extra or {}, files),
        "manifest_version": MANIFEST_VERSION,
        "name": name,
        "version": version,
        "summary": summary,
        "description_file": CARD_NAME,
        "created": created or clock.timestamp(),
        "license": license,
        "authors": msgspec.to_builtins(tuple(authors)),
        "base": msgspec.to_builtins(_completed(described, hints, base_license)),
        "task": {"id": task, "languages": list(languages)},
        **_derived(source, files),
    }
    return _finished(value, files, tuple(sorted({*names} - {*files})))


def write_package(plan: PackPlan, out: Path) -> Package:
    """Write the planned files to a folder that does not exist yet, or is empty.

    Raises:
        StoreError: it exists and is not empty, or cannot be written.
    """
    with atomic.new_folder(out) as folder:
        for name, chunks in plan.files.items():
            atomic.replace(folder / name, chunks)
    return open_package(out)


def _derived(source: AdapterSource, files: Mapping[str, Chunks]) -> dict[str, Any]:
    modules = derived.modules_of(source)
    return {
        "kind": derived.kind_of(modules),
        "adapter": {
            "format": "peft-safetensors",
            "modules": msgspec.to_builtins(modules),
            "summary": msgspec.to_builtins(derived.summary_of(modules)),
        },
        "files": [
            msgspec.to_builtins(
                File(
                    path=name,
                    role=layout.role_of(name) or "card",
                    size=sum(map(len, files[name])),
                    sha256=digest.of_chunks(files[name]),
                )
            )
            for name in sorted(files)
        ],
    }


def _finished(
    value: dict[str, Any], files: Mapping[str, Chunks], left_out: tuple[str, ...]
) -> PackPlan:
    unknown = codec.unknown_fields(value)
    if unknown:
        raise InputError(
            "the manifest has no such field", where=f"the manifest#{unknown[0]}"
        )
    # Through the codec: what we write is never what we would refuse.
    canonical_form = canonical.encode(
        {key: item for key, item in value.items() if item not in (None, [], ())}
    )
    manifest = codec.decode(canonical_form, where="the manifest")
    check_manifest(manifest, where="the manifest")
    data = codec.encode(manifest)
    return PackPlan(
        manifest=manifest,
        digest=digest.of_bytes(data),
        files=dict(sorted({**files, MANIFEST_NAME: (data,)}.items())),
        left_out=left_out,
    )


def _completed(base: Base, hints: Sequence[BaseHint], license_of_base: str | None) -> Base:
    return msgspec.structs.replace(base, hints=tuple(hints), license=license_of_base)


def _prompt(extra: Mapping[str, Any], files: Mapping[str, Chunks]) -> dict[str, Any]:
    if TEMPLATE_NAME not in files:
        return dict(extra)
    prompt = {"chat_template_file": TEMPLATE_NAME, **extra.get("prompt", {})}
    return {**extra, "prompt": prompt}


def _hints_of(source: AdapterSource) -> tuple[BaseHint, ...]:
    """Return what the adapter's own config calls its base, unless that is a local path."""
    name = source.base_name
    # A folder here whose name looks like one on a hub is the user's own.
    if name is None or not _HUB_NAME.fullmatch(name) or Path(name).exists():
        return ()
    revision = source.base_revision
    is_pinned = revision is not None and _COMMIT.fullmatch(revision)
    return (BaseHint(hub="hf", repo=name, revision=revision if is_pinned else None),)


def _check_license_text(expression: str, files: Iterable[str], src: Path) -> None:
    own = [name for name in spdx.identifiers(expression) if name.startswith("LicenseRef-")]
    if own and not any(layout.role_of(name) == "license" for name in files):
        raise InputError(
            f"{own[0]} is a licence of the author's own, and its text is missing",
            where=str(src),
            hint="put the text into the folder as LICENSE",
        )


def _check_hints(hints: Iterable[BaseHint]) -> None:
    for hint in hints:
        # A path tells strangers about the author's machine and nobody about the base.
        if hint.repo.startswith(("/", ".", "~")) or "\\" in hint.repo:
            raise InputError(
                f"the base's name {hint.repo!r} is a local path, which is never published",
                hint="give the name under which others find the base, or none",
            )


def _check_task(task: str) -> None:
    first = task.partition("/")[0]
    if first not in TASKS:
        near = difflib.get_close_matches(first, TASKS, n=1)
        raise InputError(
            f"{first!r} is no task",
            where="--task",
            hint=f"did you mean {near[0]}?"
            if near
            else f"one of {', '.join(sorted(TASKS))}",
        )


def _check_extra(extra: Mapping[str, Any]) -> None:
    unknown = sorted(key for key in extra if key not in EXTRA_FIELDS)
    if unknown:
        raise InputError(
            f"{unknown[0]!r} cannot be stated here",
            hint=f"further fields are {', '.join(sorted(EXTRA_FIELDS))}",
        )
    training = extra.get("training")
    if isinstance(training, Mapping) and training.get("attested"):
        raise InputError(
            "attested is true, and no provenance travels with the package",
            where="training",
            hint="leave it out: what an author states is a claim",
        )
