"""`kill -9` of a merge at many moments: no output folder or a whole one, and the next run
completes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import tiny_adapter, tiny_base

MOMENTS = 12

# The child says when it begins to write; a slow progress callback spreads the writing over
# time, so that kills fall into every part of it.
PROGRAM = """
import sys, time
from pathlib import Path
from lora_hub.formats.detect import open_adapter
from lora_hub.merging.execute import execute
from lora_hub.merging.plan import Part, plan
from lora_hub.tensors.checkpoint import Checkpoint

base, adapter, out = map(Path, sys.argv[1:4])
pause_s = float(sys.argv[4])
parts = [Part(open_adapter(adapter), 0.5)]
with Checkpoint.open(base) as checkpoint:
    made = plan(checkpoint, parts)
    print("writing", flush=True)
    execute(made, checkpoint, parts, out, progress=lambda *_: time.sleep(pause_s))
print("done", flush=True)
"""

pytestmark = pytest.mark.slow


def merge(base, adapter, out, pause_s=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base), str(adapter), str(out), str(pause_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = tiny_base(folder / "base", max_shard_size="4KB")
    adapter = tiny_adapter(folder / "adapter")
    whole = folder / "whole"
    child = merge(base, adapter, whole)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return base, adapter, files_of(whole)


def test_a_killed_merge_leaves_nothing_or_all_and_the_next_completes(folders, tmp_path):
    base, adapter, whole = folders
    out = tmp_path / "out"
    pause_s = 0.02  # about 25 tensors: half a second of writing
    killed = 0

    for moment in range(MOMENTS):
        child = merge(base, adapter, out, pause_s)
        assert child.stdout.readline() == "writing\n", child.stderr.read()
        time.sleep(moment * 0.06)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        if out.exists():
            assert files_of(out) == whole
            break

    assert killed >= 3
    if not out.exists():
        child = merge(base, adapter, out)
        child.communicate(timeout=120)
    assert files_of(out) == whole
