"""Peak memory of `lorahub merge` on the real base, beside that of `import torch`.

    python benchmarks/merge_memory.py

Each figure is the largest resident set (ru_maxrss) of a whole process, the median of
three. The command pulls two adapters by name, verifies them, checks the base and merges.
The aim is at most 150 MB above `import torch`, whatever the size of the base.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build" / "base"
RUNS = 3
AIM_MB = 150

TELL = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
IMPORT = "import torch"
MERGE = """
import sys
from lora_hub.cli.main import run
assert run(sys.argv[1:]) == 0
"""
COMMAND = ["merge", "style/shakespeare=0.5", "style/milton=0.5", "--registry", "registry"]


def peak_mb(program: str, *arguments: str) -> float:
    """Return the peak of a process that runs the program; ru_maxrss is in KiB on Linux."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{TELL}", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def merge_mb() -> float:
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        places = ["--base", str(BASE), "--out", str(Path(folder) / "merged")]
        return peak_mb(MERGE, *COMMAND, *places)


def main() -> int:
    torch_mb = statistics.median(peak_mb(IMPORT) for _ in range(RUNS))
    merging_mb = statistics.median(merge_mb() for _ in range(RUNS))
    above = merging_mb - torch_mb
    size = sum(path.stat().st_size for path in BASE.glob("*.safetensors")) / 1e6
    print(f"import torch      {torch_mb:7.1f} MB")
    print(f"lorahub merge     {merging_mb:7.1f} MB   base of {size:.0f} MB, two adapters")
    print(f"above             {above:7.1f} MB   aim: at most {AIM_MB} MB")
    return 0 if above <= AIM_MB else 1


if __name__ == "__main__":
    sys.exit(main())
