"""Runs command lines, each in a process of its own, and tells what each did.

    python -m tests.conformance.hostile.probe   requests on stdin, answers on stdout

A request is one line of JSON: {"arguments": […], "folder": "…"}; so is an answer, see
`Answer`. The processes are forked from one that has imported what commands need, so a
case costs milliseconds; memory and time are those of the case, the interpreter included.

Files are told by the interpreter's own audit events: every opening of a file and every
listing of a folder, whatever library asks for it.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

IMPORTED = (
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "jsonschema",
    "lora_hub.inspect.summary",
    "lora_hub.package.pack",
    "lora_hub.public.converting",
    "lora_hub.public.find",
    "lora_hub.public.packaging",
    "lora_hub.public.publishing",
    "lora_hub.registry.check",
    "lora_hub.registry.pull",
    "lora_hub.validation.reports",
    "lora_hub.validation.run",
    "lora_hub.validation.waivers",
    "numpy",
    "rfc8785",
    *(f"lora_hub.cli.commands.{name}" for name in ("validate", "verify", "pack", "pull")),
)

SECONDS = 20  # after which a case counts as hanging


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command did.

    Attributes:
        code: the exit code; negative for a signal, -9 where it took too long.
        error: the type of the error that ended it, empty where none did.
        outside: what it opened or listed that is not its own.
        peak_mb: memory, decimal megabytes.
        cpu_s: processor time.
    """

    code: int
    error: str
    out: str
    err: str
    outside: tuple[str, ...]
    peak_mb: float
    cpu_s: float


def ask(requests: Sequence[tuple[Sequence[str], Path]]) -> list[Answer]:
    """Return what each command line did in its folder, in order; all cores share them."""
    lines = [
        json.dumps({"arguments": list(arguments), "folder": str(folder)})
        for arguments, folder in requests
    ]
    servers = min(os.cpu_count() or 1, 4)
    with ThreadPool(servers) as pool:
        told = pool.map(_ask, [lines[start::servers] for start in range(servers)])
    answers: list[Answer] = [None] * len(lines)  # type: ignore[list-item]
    for start, some in enumerate(told):
        answers[start::servers] = some
    return answers


def _ask(lines: Sequence[str]) -> list[Answer]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.hostile.probe"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [Answer(**answer | {"outside": tuple(answer["outside"])}) for answer in answers]


def serve() -> None:
    # What a command imports is imported once; torch is none of it.
    for name in IMPORTED:
        importlib.import_module(name)
    for request in sys.stdin.read().splitlines():
        print(json.dumps(_in_child(**json.loads(request))), flush=True)


def _in_child(arguments: list[str], folder: str) -> dict[str, object]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # Beside the time of the processor, which a command that waits does not spend.
        signal.alarm(SECONDS)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with os.fdopen(writing, "w") as stream:
            json.dump(_run(arguments, Path(folder)), stream)
            stream.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status, usage = os.wait4(child, 0)
    measured = {
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }
    if not text:
        told: dict[str, object] = {"error": "", "out": "", "err": "", "outside": ()}
        return told | measured | {"code": os.waitstatus_to_exitcode(status)}
    return json.loads(text) | measured


def _run(arguments: list[str], folder: Path) -> dict[str, object]:
    home = folder / "home"
    home.mkdir()
    (folder / "made").mkdir()
    os.environ |= {
        "LORAHUB_HOME": str(home / "home"),
        "LORAHUB_CACHE": str(home / "cache"),
        "LORAHUB_TRACEBACK": "1",
    }
    os.chdir(home)
    # No command of a hostile case needs more: what asks for it fails at once.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    from lora_hub.cli import main

    raised: list[str] = []

    def command() -> object:
        try:
            return main.lorahub.main(arguments, "lorahub", standalone_mode=False)
        except BaseException as error:
            raised.append(type(error).__name__)
            raise

    out, err = io.StringIO(), io.StringIO()
    # argv[1] is what the command is given; only that, and what it writes, is its own.
    own = (
        *(Path(folder, name) for name in ("home", "made", "base")),
        Path(_subject(arguments)),
    )
    with _watched(own) as outside:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.guard(command)
        seen = sorted(set(outside))
    return {
        "code": code,
        "error": "".join(raised),
        "out": out.getvalue(),
        "err": err.getvalue(),
        "outside": seen,
    }


def _subject(arguments: Sequence[str]) -> str:
    if "--registry" in arguments:
        return arguments[arguments.index("--registry") + 1]
    return arguments[2] if arguments[0] == "registry" else arguments[1]


@contextlib.contextmanager
def _watched(own: Sequence[Path]) -> Iterator[list[str]]:
    """Give the list of paths that are opened or listed and are not our own."""
    import lora_hub
    from tests.conformance.hostile.case import PRIVATE, PUBLIC

    installed = [Path(sys.prefix), Path(sys.base_prefix), Path(lora_hub.__file__).parent]
    allowed = [os.path.realpath(path) for path in (*own, *installed, PRIVATE, PUBLIC)]
    allowed += ["/dev/null", "/usr/lib", "/usr/share/zoneinfo"]
    outside: list[str] = []
    is_on = True

    def hook(event: str, details: tuple[object, ...]) -> None:
        if not is_on or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = details[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, which was opened under its name
        text = os.fsdecode(path)
        flags = details[2] if event == "open" else 0
        if isinstance(flags, int) and flags & os.O_NOFOLLOW and os.path.islink(text):
            return  # the system refuses to open it
        real = os.path.realpath(text)
        if not any(real == one or real.startswith(f"{one}/") for one in allowed):
            outside.append(real)

    sys.addaudithook(hook)
    yield outside
    is_on = False


if __name__ == "__main__":
    serve()
