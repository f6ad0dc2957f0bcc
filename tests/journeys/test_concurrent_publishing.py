"""Sixteen publishers, one folder, no server, no lock: nothing is lost."""

import subprocess
import sys

from lora_hub.registry.check import check
from lora_hub.registry.registry import init
from tests.packages import PUBLIC, package

PROCESSES = 16
NAMES = 8
VERSIONS = 160

# Waits until all are there, then pushes one package after another.
PUBLISHER = """
import sys, time
from pathlib import Path
from lora_hub.package.package import open_package
from lora_hub.registry.publish import push
from lora_hub.registry.registry import open_registry

root, number = Path(sys.argv[1]), sys.argv[2]
registry = open_registry(root / "registry")
public = (root / "key.pub").read_bytes()
(root / "ready" / number).touch()
while not (root / "go").exists():
    time.sleep(0.001)
for folder in sys.argv[3:]:
    result = push(open_package(Path(folder)), registry, public_key=public)
    print(result.name, result.version, result.seq, result.already)
"""


def start(root, number, folders):
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, root, str(number), *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def publish_at_once(root, shares):
    """Let one process a share push it, all from the same moment; return what they print."""
    (root / "ready").mkdir()
    (root / "key.pub").write_bytes(PUBLIC)
    publishers = [start(root, number, share) for number, share in enumerate(shares)]
    while len(list((root / "ready").iterdir())) < len(publishers):
        assert all(publisher.poll() is None for publisher in publishers)
    (root / "go").touch()
    lines = []
    for publisher in publishers:
        out, err = publisher.communicate()
        assert (publisher.returncode, err) == (0, "")
        lines += out.splitlines()
    return [line.split() for line in lines]


def left_over(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


def test_sixteen_publishers_at_once_lose_no_version(tmp_path):
    registry = init(tmp_path / "registry", "busy")
    folders = []
    for number in range(VERSIONS):
        name, minor = f"style/adapter-{number % NAMES}", number // NAMES
        folder = tmp_path / f"packages/{number}"
        package(folder, name=name, version=f"1.{minor}.0", seed=number)
        folders.append(folder)
    # Ten neighbours each, so that every process publishes under every name.
    share = VERSIONS // PROCESSES
    shares = [folders[start : start + share] for start in range(0, VERSIONS, share)]

    lines = publish_at_once(tmp_path, shares)

    assert len(lines) == VERSIONS
    assert check(registry) == ()
    assert list(registry.names()) == [f"style/adapter-{number}" for number in range(NAMES)]
    for name in registry.names():
        versions = [entry.version for entry in registry.versions(name)]
        assert versions == [f"1.{minor}.0" for minor in range(VERSIONS // NAMES)]
        numbers = sorted(int(seq) for found, _, seq, _ in lines if found == name)
        assert numbers == list(range(1, VERSIONS // NAMES + 1))
    assert registry.keys("style") == (PUBLIC,)
    assert left_over(tmp_path) == []


def test_eight_publishers_of_the_same_version_make_one(tmp_path):
    registry = init(tmp_path / "registry", "busy")
    package(tmp_path / "package")

    lines = publish_at_once(tmp_path, [[tmp_path / "package"]] * 8)

    assert sorted(already for *_, already in lines) == ["False"] + ["True"] * 7
    assert len(registry.events("style/tiny")) == 1
    assert check(registry) == ()
    assert left_over(tmp_path) == []
