"""Peak memory of a merge on the real base, beside that of `import torch`.

    python benchmarks/merge_memory.py

Each figure is the largest resident set (ru_maxrss) of a process of its own, the median
of three. The aim is a merge at most 150 MB above `import torch`, whatever the size of the
base.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build" / "base"
ADAPTERS = ROOT / "tests" / "assets" / "adapters"
RUNS = 3
AIM_MB = 150

TELL = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
IMPORT = "import torch"
MERGE = """
import sys
from pathlib import Path
from lora_hub.formats.detect import open_adapter
from lora_hub.merging.execute import execute
from lora_hub.merging.plan import Part, plan
from lora_hub.tensors.checkpoint import Checkpoint

base, adapters, out = map(Path, sys.argv[1:])
parts = [Part(open_adapter(adapters / name), 0.5) for name in ("shakespeare", "milton")]
with Checkpoint.open(base) as checkpoint:
    execute(plan(checkpoint, parts), checkpoint, parts, out)
"""


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
        return peak_mb(MERGE, str(BASE), str(ADAPTERS), str(Path(folder) / "merged"))


def main() -> int:
    torch_mb = statistics.median(peak_mb(IMPORT) for _ in range(RUNS))
    merging_mb = statistics.median(merge_mb() for _ in range(RUNS))
    above = merging_mb - torch_mb
    size = sum(path.stat().st_size for path in BASE.glob("*.safetensors")) / 1e6
    print(f"import torch      {torch_mb:7.1f} MB")
    print(f"merge             {merging_mb:7.1f} MB   base of {size:.0f} MB, two adapters")
    print(f"above             {above:7.1f} MB   aim: at most {AIM_MB} MB")
    return 0 if above <= AIM_MB else 1


if __name__ == "__main__":
    sys.exit(main())
