"""`lorahub validate`: findings for CI."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal

FOUND = 1


@click.command()
@click.argument("paths", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
)
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning"]),
    default="error",
    show_default=True,
    help="The lowest severity that gives exit code 1.",
)
def command(paths: tuple[Path, ...], form: str, fail_on: str) -> int:
    """Check packages, adapter folders and registries at PATHS.

    Exit code 0: nothing at or above the failing severity; 1: findings.
    """
    from lora_hub.public import packaging
    from lora_hub.validation.reports import REPORTS

    findings = packaging.validate(*paths)
    terminal.out(REPORTS[form](findings))
    failing = {"error"} if fail_on == "error" else {"error", "warning"}
    return FOUND if any(finding.severity in failing for finding in findings) else 0
