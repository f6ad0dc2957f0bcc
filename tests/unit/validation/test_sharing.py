"""Work that is shared gives what one process gives, whichever way the others start."""

import subprocess
import sys

from lora_hub.validation.sharing import shared

ALONE = """
import multiprocessing, os, threading
from lora_hub.validation import sharing

def absolute(numbers):
    return list(map(abs, numbers))

def parent(numbers):
    return [os.getppid() for _ in numbers]

if __name__ == "__main__":
    before = dict(os.environ)
    assert sharing._may_fork()
    assert sharing.shared(absolute, range(-99, 0), 2) == list(range(99, 0, -1))
    (own, *others) = sharing.shared(parent, range(99), 2)
    assert set(others) == {os.getpid()}  # copies of this process are its children
    assert dict(os.environ) == before

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert not sharing._may_fork()
    assert sharing.shared(absolute, range(-99, 0), 2) == list(range(99, 0, -1))
    stop.set()
    print("as expected")
"""


def absolute(numbers):
    return list(map(abs, numbers))


def test_results_come_in_the_order_of_the_arguments():
    assert shared(absolute, range(-200, 0), 2) == list(range(200, 0, -1))


def test_process_of_one_thread_is_copied_and_no_other(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)

    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )

    assert done.stdout == "as expected\n", done.stderr
