"""`lorahub validate`: findings for CI."""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lora_hub.cli import options, terminal
from lora_hub.validation.rules import Severity

FOUND = 1

# New objects between two looks for cycles.
_SELDOM = 100_000


@contextlib.contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Look for cycles seldom: what importing makes stays, and a check makes none.

    As often as Python looks for them, they take a tenth of the start-up.
    """
    before = gc.get_threshold()
    gc.set_threshold(_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "sarif", "junit", "github"]),
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
@click.option(
    "--waivers",
    type=options.PATH,
    metavar="FILE",
    help="Findings to live with. Default: lorahub-waivers.toml here, if not in PATHS.",
)
@options.reading()
@click.option(
    "--fix",
    is_flag=True,
    help="First mend the configs of bare adapter folders; packages are never touched.",
)
@_seldom_collecting()
def command(
    paths: tuple[Path, ...],
    form: str,
    fail_on: Severity,
    waivers: Path | None,
    how: Mapping[str, Any],
    fix: bool,
) -> int:
    """Check packages, adapter folders and registries at and below PATHS.

    Exit code 0: nothing at or above the failing severity; 1: findings.
    """
    from lora_hub.public import packaging
    from lora_hub.validation.reports import REPORTS

    if fix:
        for change in packaging.fix(*paths):
            terminal.talk(change)
    checked = packaging.check(*paths, waivers=waivers, processes=os.cpu_count() or 1, **how)
    terminal.out(REPORTS[form](checked, fail_on))
    fails = any(one.fails(fail_on) for each in checked for one in each.findings)
    return FOUND if fails else 0
