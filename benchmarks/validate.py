"""How fast is `validate` beside the hash of the same bytes?

    python benchmarks/validate.py [PACKAGES]

Makes two folders, one after the other, of PACKAGES (1,000 without) signed packages of 2 MB
each, of random numbers. In the first all are alike (rank 8 for 60 targets of one base), so
that all but their numbers is known from the one before; in the second no two have the same
header or the same base. In turn and five times, what the disk cache holds is hashed with
SHA-256 by as many threads as there are cores, and validated; the medians of the seconds and
of their ratios are printed. The aim is a ratio of at least 0.6. The start-up of the command
is part of `validate`, and printed beside it; the modules are compiled, as `pip install`
leaves them, whatever PYTHONDONTWRITEBYTECODE says of a checkout. On a machine that does
other things, the ratio of the processors' seconds tells more than that of the clock's; both
are printed.
Manifests alone (read, schema, canonical form, consistency) are counted on one core and
with a process for each core; the aim is 2,000 a second on two.
"""

import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_hub import canonical, digest
from lora_hub.formats import peft
from lora_hub.formats.detect import open_adapter
from lora_hub.manifest import codec
from lora_hub.manifest import document as d
from lora_hub.package import derived, layout
from lora_hub.registry.trust import TrustStore
from lora_hub.signing import keys
from lora_hub.signing.sign import sign
from lora_hub.tensors.write import chunks_of
from lora_hub.validation.manifest import check_bytes

ROUNDS = 5
AIM, AIM_MANIFESTS = 0.6, 2000
CORES = os.cpu_count() or 1
SIZE_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Kind:
    """What an adapter is but its numbers."""

    rank: int
    hidden: int
    layers: int
    names: tuple[str, ...]


def alike(seed: int) -> Kind:
    return Kind(rank=8, hidden=512, layers=30, names=("q_proj", "v_proj"))


def unlike(seed: int) -> Kind:
    """Return another kind for each seed below 4,000."""
    rank, hidden = 4 + seed % 13, 256 + 8 * (seed // 13 % 64)
    names = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj")[: 1 + seed // 832]
    layers = round(SIZE_BYTES / (8 * rank * hidden * len(names)))
    return Kind(rank, hidden, layers, names)


def make_package(folder: Path, seed: int, kind: Kind, key: Any) -> None:
    """Fill the folder with a package of its own random weights, about 2 MB."""
    folder.mkdir()
    numbers = np.random.default_rng(seed)
    arrays = {}
    shapes = {}
    for layer in range(kind.layers):
        for name in kind.names:
            target = f"model.layers.{layer}.self_attn.{name}"
            shapes[target] = (kind.hidden, kind.hidden)
            a, b = peft.tensor_names(target)
            for tensor, shape in (
                (a, (kind.rank, kind.hidden)),
                (b, (kind.hidden, kind.rank)),
            ):
                arrays[tensor] = numbers.standard_normal(shape, dtype="f4")
    specs = [(name, "F32", arrays[name].shape) for name in sorted(arrays)]
    chunks = chunks_of(specs, lambda name: (arrays[name].tobytes(),))
    (folder / peft.WEIGHTS_NAME).write_bytes(b"".join(map(bytes, chunks)))
    config = peft.build_config(
        dict.fromkeys(shapes, (kind.rank, 16.0)), "alpha/r", base_name="lab/base"
    )
    (folder / "adapter_config.json").write_bytes(canonical.encode(config))
    (folder / "README.md").write_text(f"# Package {seed}\n")
    (folder / d.MANIFEST_NAME).write_bytes(codec.encode(manifest(folder, seed, shapes)))
    digests = {path.name: digest.of_bytes(path.read_bytes()) for path in folder.iterdir()}
    (folder / "model.sig").write_bytes(sign(digests, subject=folder.name, key=key))


def manifest(folder: Path, seed: int, shapes: dict[str, tuple[int, int]]) -> d.Manifest:
    modules = derived.modules_of(open_adapter(folder))
    sha256 = digest.of_bytes(b"")
    files = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found, size = digest.of_bytes(data), len(data)
        role = layout.role_of(path.name)
        files.append(d.File(path=path.name, role=role, size=size, sha256=found))  # type: ignore[arg-type]
    return d.Manifest(
        manifest_version=d.MANIFEST_VERSION,
        name=f"bench/package-{seed}",
        version="1.0.0",
        kind=derived.kind_of(modules),
        summary="random numbers",
        created="2026-01-01T00:00:00Z",
        license="Apache-2.0",
        base=d.Base(
            root=sha256,
            struct=sha256,
            targets=tuple(
                d.BaseTarget(module=target, shape=shape, dtype="BF16", sha256=sha256)
                for target, shape in sorted(shapes.items())
            ),
            config=d.BaseConfig(model_type="llama"),
        ),
        adapter=d.AdapterInfo(
            format="peft-safetensors", modules=modules, summary=derived.summary_of(modules)
        ),
        task=d.Task(id="text-generation"),
        files=tuple(files),
    )


def hash_all(files: Sequence[Path]) -> None:
    def one(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    with ThreadPoolExecutor(CORES) as pool:
        assert len(list(pool.map(one, files))) == len(files)


def validate_all(folder: Path, compiled: Path) -> None:
    """Run the command as a user does, its start-up included.

    Args:
        folder: what is validated.
        compiled: where its modules lie compiled, from the second run on.
    """
    command = [str(Path(sys.executable).with_name("lorahub")), "validate", str(folder)]
    # An empty PYTHONDONTWRITEBYTECODE is none.
    said = {"PYTHONPYCACHEPREFIX": str(compiled), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | said
    )
    assert done.stdout == "no findings\n", done.stdout + done.stderr


def check_manifests(documents: Sequence[bytes]) -> int:
    for data in documents:
        _, found = check_bytes(data, "lorahub.json")
        assert not found, found[0]
    return len(documents)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return how long it took by the clock, and how long the processors worked for it."""
    start, busy = time.perf_counter(), processor_s()
    run()
    return time.perf_counter() - start, processor_s() - busy


def processor_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def make_packages(folder: Path, count: int, kind_of: Callable[[int], Kind]) -> None:
    os.environ["LORAHUB_HOME"] = str(folder.parent / "home")
    folder.mkdir()
    key = keys.private_key(keys.generate())
    TrustStore().add("bench", [keys.public_pem(key)])
    for seed in range(count):
        make_package(folder / f"package-{seed:05d}", seed, kind_of(seed), key)


def measure(title: str, count: int, kind_of: Callable[[int], Kind]) -> tuple[float, float]:
    """Print the times of one folder; return the ratio by the clock and manifests/s."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, compiled = Path(temporary, "packages"), Path(temporary, "compiled")
        make_packages(folder, count, kind_of)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size_bytes = sum(path.stat().st_size for path in files)
        runs: dict[str, Callable[[], object]] = {
            "SHA-256": lambda: hash_all(files),
            "validate": lambda: validate_all(folder, compiled),
            "start-up": lambda: validate_all(folder / "package-00000", compiled),
        }
        validate_all(folder, compiled)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(seconds(run))
        documents = [path.read_bytes() for path in folder.glob(f"*/{d.MANIFEST_NAME}")]
    print(f"{title}: {count} packages, {size_bytes / 1e6:.0f} MB, {CORES} cores")
    for name, found in times.items():
        clock_s, busy_s = map(statistics.median, zip(*found, strict=True))
        print(f"  {name:9} {clock_s:7.2f} s, {busy_s:.2f} s of processors")
    clock, busy = (
        statistics.median(
            hashed[which] / checked[which]
            for hashed, checked in zip(times["SHA-256"], times["validate"], strict=True)
        )
        for which in (0, 1)
    )
    print(f"  ratio     {clock:7.2f} by the clock, {busy:.2f} of processors    aim: {AIM}")
    return clock, manifests(documents)


def manifests(documents: Sequence[bytes]) -> float:
    """Print how many manifests are checked in a second; return that of all cores."""
    one_core = len(documents) / seconds(lambda: check_manifests(documents))[0]
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(check_manifests, [documents[:1]] * CORES))  # the processes are up
        parts = [documents[index::CORES] for index in range(CORES)]
        clock_s, _ = seconds(lambda: list(pool.map(check_manifests, parts)))
    size = statistics.mean(map(len, documents)) / 1e3
    print(
        f"  manifests {one_core:7.0f}/s on one core, {len(documents) / clock_s:.0f}/s on "
        f"{CORES} ({size:.0f} kB each)    aim: {AIM_MANIFESTS}/s"
    )
    return len(documents) / clock_s


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    clock, rate = measure("all alike", count, alike)
    measure("all unlike", count, unlike)
    return 0 if clock >= AIM and rate >= AIM_MANIFESTS else 1


if __name__ == "__main__":
    sys.exit(main())
