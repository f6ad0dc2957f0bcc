"""`lorahub show`: one version of an adapter, and all its versions."""

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("ref")
@options.registry
@options.as_json
def command(ref: str, registry: str | None, as_json: bool) -> None:
    """Show what the registry says of REF, without fetching its weights."""
    from lora_hub import refs
    from lora_hub.public.find import open_registry
    from lora_hub.registry.fetch import open_published
    from lora_hub.registry.resolve import resolve

    parsed = refs.parse(ref)
    opened = open_registry(parsed.registry or registry)
    resolved = resolve(parsed, opened)
    for note in resolved.notes:
        terminal.note(note)
    manifest = open_published(resolved, opened).manifest
    versions = opened.versions(parsed.full_name)
    if as_json:
        terminal.out_json(
            {
                "package": resolved.package,
                "manifest": manifest,
                "versions": [
                    {
                        "version": entry.version,
                        "package": entry.package,
                        "yanked": entry.yanked,
                    }
                    for entry in versions
                ],
            }
        )
        return
    summary = manifest.adapter.summary
    rows = [
        ("name", f"{manifest.name} {manifest.version}"),
        ("package", resolved.package),
        ("summary", manifest.summary),
        ("task", manifest.task.id),
        ("license", manifest.license),
        ("authors", ", ".join(author.name for author in manifest.authors)),
        ("created", manifest.created),
        ("base", manifest.base.root),
        ("found at", ", ".join(f"{hint.hub}:{hint.repo}" for hint in manifest.base.hints)),
        ("architecture", ", ".join(manifest.base.config.architectures)),
        ("targets", f"{len(manifest.adapter.modules)}: {', '.join(summary.target_names)}"),
        ("rank", ", ".join(map(str, summary.ranks))),
        ("parameters", f"{summary.parameters:,}"),
        ("size", terminal.size(resolved.size_bytes)),
        *(
            (
                result.metric,
                f"{result.value:.4g} (base {result.base_value:.4g}), {result.suite}",
            )
            for result in manifest.evaluation
        ),
        (
            "versions",
            ", ".join(
                f"{entry.version} (withdrawn: {entry.yanked})"
                if entry.yanked
                else entry.version
                for entry in versions
            ),
        ),
    ]
    terminal.table([row for row in rows if row[1]])
