"""An adapter's folder, and the base it was made for → a package.

`plan_package` decides everything: the manifest and the bytes of every file. `write_package`
puts them into a folder that is there whole or not. The same input gives the same bytes:
names are sorted, JSON is canonical, tensors are copied and never converted, and the time
is that of SOURCE_DATE_EPOCH where it is set. What the manifest says of the adapter is
derived from those bytes as every reader of the package will find them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from lora_hub import atomic, canonical, clock, digest, refs
from lora_hub.base.folder import BaseInFolder, describe
from lora_hub.base.pipeline import open_base
from lora_hub.base.structure import Structure, check_structure
from lora_hub.errors import InputError
from lora_hub.formats.detect import detect_and_read, source_from_files
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
from lora_hub.package import contents, derived, layout, spdx, stated
from lora_hub.package.card import write_card
from lora_hub.package.contents import Chunks
from lora_hub.package.layout import CARD_NAME, TEMPLATE_NAME
from lora_hub.package.package import Package, check_manifest, open_package

# A list in the text of a plan names so many and counts the others.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A package before it is written.

    Attributes:
        files: name → content in pieces, in order of names, the manifest among them.
        left_out: what lies in the source and has no place in a package.
        new: tensors it brings that the base does not have, as a head for its task.
    """

    manifest: Manifest
    digest: str
    files: Mapping[str, Chunks]
    left_out: tuple[str, ...]
    new: tuple[str, ...] = ()

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
            *self._extra(),
            f"for the base {self.manifest.base.root}",
            *(f"  {size:>{width}}  {name}" for name, size in sizes.items()),
            *(f"  left out: {name}" for name in self.left_out),
        ]
        return "\n".join(lines)

    def _extra(self) -> list[str]:
        extra = self.manifest.adapter.extra_tensors
        if not extra:
            return []
        names = [
            one.name if one.rows is None else f"{len(one.rows)} rows of {one.name}"
            for one in extra
        ]
        more = f" and {len(extra) - _NAMED} more" if len(extra) > _NAMED else ""
        new = f"; the base does not have {', '.join(self.new[:_NAMED])}" if self.new else ""
        if len(self.new) > _NAMED:
            new += f" and {len(self.new) - _NAMED} more"
        return [f"brought anew: {', '.join(names[:_NAMED])}{more}{new}"]


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
    options: ReadOptions | None = None,
    dialect: str | None = None,
) -> PackPlan:
    """Return the package that a folder makes, without writing anything.

    Args:
        src: an adapter's folder in a dialect of `formats/detect.py`.
        name: namespace/name.
        version: `refs.parse_version`.
        base: the folder of the base the adapter was trained on, a checkpoint or a pipeline.
        task: a task of `manifest/tasks.py`, with or without a free part behind a slash.
        license: SPDX expression of the adapter.
        summary: one line.
        authors: who made it.
        hints: where the base may be found; without any, what the adapter's own config
            calls it, if that is a name on a hub and no local path.
        base_license: SPDX expression of the base.
        languages: ISO 639 codes.
        card: text of the card; the source's README.md without.
        extra: further fields of the manifest, those of `stated.EXTRA_FIELDS`.
        created: RFC 3339 in UTC; SOURCE_DATE_EPOCH or now without.
        digest_cache: where digests of the base are kept between runs.
        options: what no file of the source says; `base` is taken from above.
        dialect: what the source is, where two dialects could be meant.

    Raises:
        InputError: a field is not as the manifest wants it, or the source holds pickles;
            see `detect.open_adapter` for the rest.
        LossyConversion: the adapter does what the files of a package cannot say.
        FitError: the base lacks a target, or has it in another shape.
    """
    refs.parse_name(name)
    refs.parse_version(version)
    stated.check_task(task)
    for expression in filter(None, (license, base_license)):
        spdx.check_license(expression)
    stated.check_extra(extra or {})
    options = replace(options or ReadOptions(), base=base)
    if os.path.isdir(src):  # false, too, where we may not look
        contents.refuse_links(src)
    detected, source = detect_and_read(src, options, dialect=dialect)
    contents.refuse_unsaid(source)
    names = sorted(entry.name for entry in src.iterdir())
    contents.refuse_pickles(names, src)
    hints = tuple(hints) or stated.hints_of(source)
    stated.check_hints(hints)
    with open_base(base, digest_cache) as view:
        structure = check_structure(source, view)
        described = _described(view, source, structure)
        base_tensors = frozenset(view.tensors)
    files = contents.weights_and_config(source, hints, base_tensors)
    files |= contents.copied(src, base, names)
    stated.check_license_text(license, files, src)
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
        **_derived(_as_written(files, src), files),
    }
    left_out = tuple(sorted({*names} - {*files, detected.weights_name}))
    return replace(_finished(value, files), left_out=left_out, new=structure.new)


def write_package(plan: PackPlan, out: Path) -> Package:
    """Write the planned files to a folder that does not exist yet, or is empty.

    Raises:
        StoreError: it exists and is not empty, or cannot be written.
    """
    with atomic.new_folder(out) as folder:
        for name, chunks in plan.files.items():
            atomic.replace(folder / name, chunks)
    return open_package(out)


def _as_written(files: Mapping[str, Chunks], src: Path) -> AdapterSource:
    """Return the adapter as every reader of the package will find it."""
    return source_from_files(lambda name: b"".join(files[name]), files, where=str(src))


def _described(view: BaseInFolder, source: AdapterSource, structure: Structure) -> Base:
    """Return what the manifest says of the base: the targets' weights, then the rest."""
    modules = [one.target for one in source.updates if one.layer != "experts"]
    weights = {f"{module}.weight" for module in modules}
    # The weight of a head that the adapter brings is not the base's.
    known = [module for module in modules if f"{module}.weight" in structure.places]
    return describe(
        view, known, also=[name for name in structure.weights if name not in weights]
    )


def _derived(source: AdapterSource, files: Mapping[str, Chunks]) -> dict[str, Any]:
    adapter = derived.adapter_of(source)
    return {
        "kind": derived.kind_of(adapter.modules, adapter.extra_tensors),
        "adapter": msgspec.to_builtins(adapter),
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


def _finished(value: dict[str, Any], files: Mapping[str, Chunks]) -> PackPlan:
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
        left_out=(),
    )


def _completed(base: Base, hints: Sequence[BaseHint], license_of_base: str | None) -> Base:
    return msgspec.structs.replace(base, hints=tuple(hints), license=license_of_base)


def _prompt(extra: Mapping[str, Any], files: Mapping[str, Chunks]) -> dict[str, Any]:
    if TEMPLATE_NAME not in files:
        return dict(extra)
    prompt = {"chat_template_file": TEMPLATE_NAME, **extra.get("prompt", {})}
    return {**extra, "prompt": prompt}
