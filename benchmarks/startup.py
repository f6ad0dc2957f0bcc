"""How long does `lorahub --version` take beside `python -c "import click"`?

Whole processes, in turn, so that a machine whose speed drifts slows both alike; the
medians and their ratio are printed. The aim is a ratio of at most 2.

Usage: python benchmarks/startup.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

COMMANDS = {
    'python -c "import click"': [sys.executable, "-c", "import click"],
    "lorahub --version": [str(Path(sysconfig.get_path("scripts"), "lorahub")), "--version"],
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 2):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number >= 2:  # the first two rounds fill the disk cache
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{median * 1000:7.1f} ms  {name}  (median of {rounds})")
    bare, ours = medians.values()
    print(f"ratio {ours / bare:.2f} (aim: at most 2)")


if __name__ == "__main__":
    main()
