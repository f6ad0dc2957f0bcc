"""The command line's frame: help, errors, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lora_hub.cli import terminal
from lora_hub.cli.main import COMMANDS, guard, lorahub, run
from lora_hub.errors import FitError, InconclusiveError, IntegrityError, NotFoundError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert run([command, "--help"]) == 0

    text = capsys.readouterr().out
    assert text.startswith(f"Usage: lorahub {command}")
    assert len(text.splitlines()) > 4


def test_every_command_file_is_in_the_table():
    files = {path.stem for path in (ROOT / "lora_hub/cli/commands").glob("[a-z]*.py")}

    assert files == set(COMMANDS)


def test_a_misspelt_command_is_met_with_the_near_one(capsys):
    assert run(["pul"]) == 2

    assert "Did you mean 'pull'" in capsys.readouterr().err


def raising(error):
    def command():
        raise error

    return command


def test_a_bug_of_ours_is_70_and_shows_no_traceback(capsys):
    assert guard(raising(ZeroDivisionError("of ours"))) == 70

    error = capsys.readouterr().err
    assert "a bug in lora_hub: ZeroDivisionError: of ours" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "f"), 6),
        (IntegrityError("the bytes differ", where="f"), 4),
        (FitError("another base", where="base"), 3),
        (InconclusiveError("not checked"), 7),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, capsys):
    assert guard(raising(error)) == code

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_hint_stands_below_its_error(capsys):
    guard(
        raising(NotFoundError("there is no such version", where="a/b", hint="look again"))
    )

    assert capsys.readouterr().err == "a/b: there is no such version\n  hint: look again\n"


def test_text_of_strangers_cannot_steer_the_terminal():
    text = "plain é — text\x1b[2Jcleared\u202egnp.exe\x07"

    assert terminal.clean(text) == "plain é — text\\u001b[2Jcleared\\u202egnp.exe\\u0007"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (4_938_648, "4.9 MB"), (2.2e12, "2200.0 GB")],
)
def test_sizes_are_readable(size, text):
    assert terminal.size(int(size)) == text


def test_the_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()

    assert re.search(r"^make demo$\n^make test$", readme, re.MULTILINE)


def shell(line):
    """Run a line in a shell, where LORAHUB is the command; return its exit and stderr."""
    command = f"LORAHUB='{sys.executable} -m lora_hub.cli.main'; set -o pipefail; {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_goes_away_is_no_verdict():
    assert shell("$LORAHUB --help | true") == (141, "", "")


def test_closed_streams_are_no_bug():
    assert shell("$LORAHUB --version >&-") == (0, "", "")
    assert shell("$LORAHUB inspect ./nowhere 2>&-") == (2, "", "")


def test_the_exit_code_tells_where_nobody_listens():
    assert shell("$LORAHUB inspect ./nowhere 2>/dev/full") == (2, "", "")
    assert shell("$LORAHUB pul 2>/dev/full") == (2, "", "")


def leaves(command, path=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            yield from leaves(command.get_command(None, name), (*path, name))
    else:
        yield path, {text for each in command.params for text in each.opts}


def test_every_command_speaks_json():
    spoken = {"--json", "--format"}

    assert [path for path, options in leaves(lorahub) if not options & spoken] == []


def test_json_holds_paths_as_text(capsys):
    terminal.out_json({"folder": Path("a/b"), "text": "\u202e"})

    assert json.loads(capsys.readouterr().out) == {"folder": "a/b", "text": "\u202e"}


@pytest.mark.parametrize(
    "line",
    ["run hi --base . --tokens 0", "cache prune --days -1", "search --max-rank 0"],
)
def test_numbers_out_of_range_are_bad_input(line):
    assert run(line.split()) == 2
