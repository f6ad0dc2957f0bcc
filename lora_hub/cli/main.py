"""The entry point: finds the command, prints errors, gives the exit code.

A command's file is imported when the command is used, so that `lorahub --version` costs
little more than Python and click. All errors are printed here and nowhere else.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

import click

from lora_hub import __version__
from lora_hub.cli.terminal import line
from lora_hub.errors import LoraHubError

# name → what `lorahub --help` says of it, in the order of an adapter's life
COMMANDS = {
    "keygen": "Make a key pair for signing.",
    "fingerprint": "Say which base a checkpoint folder holds.",
    "pack": "Make a package from an adapter folder and its base.",
    "sign": "Sign a package.",
    "verify": "Check a package's signature and every byte it covers.",
    "validate": "Check packages, adapter folders or a registry.",
    "inspect": "Show what an adapter changes, target by target.",
    "push": "Publish a package in a registry.",
    "pull": "Get a package by name, checked.",
    "search": "Find adapters by words, base, task or rank.",
    "show": "Show one version of an adapter and all its versions.",
    "yank": "Withdraw a version; who names it still gets it.",
    "trust": "List, add, remove or rotate the keys of namespaces.",
    "cache": "List, verify or prune pulled packages.",
    "registry": "Make or check a registry.",
    "compose": "Combine adapters into one.",
    "convert": "Write an adapter in another dialect.",
    "merge": "Merge adapters into a checkpoint.",
    "run": "Generate text with a base and adapters.",
}

BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
UNREAD = 141  # 128 + SIGPIPE: what was found, nobody heard


class Commands(click.Group):
    """A group that imports a command when it is used, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lora_hub.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 92},
)
@click.version_option(__version__, message="lorahub %(version)s")
def lorahub() -> None:
    """Package, sign, publish, apply, compose and merge LoRA adapters.

    Exit codes: 0 done, 1 findings, 2 bad input, 3 adapter and base do not fit,
    4 integrity or trust, 5 not found, 6 store unavailable, 7 could not be checked.
    """


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    _open_closed_streams()
    # A cancelled job is stopped with SIGTERM: clean up as after ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run(sys.argv[1:])
    # Python ends by looking through all that lives for cycles, to free memory that the
    # system takes back anyway: 28 of the 210 ms of a `validate`.
    gc.freeze()
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command line; return its exit code. Nothing is raised."""
    return guard(lambda: lorahub.main(args, "lorahub", standalone_mode=False))


def _open_closed_streams() -> None:
    """Open what was closed (`>&-`), so that no file we open is taken for it."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The lowest descriptor that is free, which is the one that was closed.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))


def guard(command: Callable[[], object]) -> int:
    """Call the command; print what it raises, one line and a hint; return the exit code."""
    try:
        result = command()
        sys.stdout.flush()
        # A command returns its exit code, or None for 0.
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # as in `_say`
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; nothing was half written")
        return INTERRUPTED
    except LoraHubError as error:
        _say(str(error), hint=error.hint)
        return error.exit_code
    except (BrokenPipeError, SystemExit):
        # The reader of our output went away (`| head`), which click tells by SystemExit.
        # No error of anybody, and no verdict: 0 and 1 would be one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{(error.strerror or str(error)).lower()}")
        return 6
    except Exception as error:  # noqa: BLE001 - the last resort: a bug of ours
        if os.environ.get("LORAHUB_TRACEBACK"):
            traceback.print_exc()
        _say(
            f"a bug in lora_hub: {type(error).__name__}: {error}",
            hint="please report it; LORAHUB_TRACEBACK=1 shows where it happened",
        )
        return BUG


def _say(problem: str, hint: str | None = None) -> None:
    with contextlib.suppress(OSError):  # nobody listens: the exit code still tells
        print(line(problem), file=sys.stderr)
        if hint:
            print(f"  hint: {line(hint)}", file=sys.stderr)


if __name__ == "__main__":
    main()
