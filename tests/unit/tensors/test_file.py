"""Reading ranges of tensors, from bytes and from disk, and what goes wrong on the way."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

from lora_hub.errors import InputError, TensorFileError
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import ADAPTER_LIMITS

TENSORS = {
    "a": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "b": torch.zeros(0, 5),
    "c": torch.tensor([1.5, -0.0, 3.0], dtype=torch.bfloat16),
}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(TENSORS))
    return path


@pytest.fixture(params=["bytes", "disk"])
def file(request, path):
    if request.param == "bytes":
        opened = TensorFile.from_bytes(path.read_bytes(), where="memory")
    else:
        opened = TensorFile.open(path)
    with opened:
        yield opened


def test_reads_every_tensor_as_the_library_wrote_it(file):
    for name, tensor in TENSORS.items():
        assert bytes(file.read(name)) == bytes_of(tensor)


def test_reads_a_range_of_a_tensor(file):
    whole = bytes_of(TENSORS["a"])

    assert bytes(file.read("a", 4, 20)) == whole[4:20]
    assert bytes(file.read("a", 40)) == whole[40:]
    assert bytes(file.read("a", 48, 48)) == b""


def test_fills_a_buffer_of_the_caller(file):
    buffer = torch.zeros(4, dtype=torch.int32).numpy()

    file.read_into("a", 16, memoryview(buffer))

    assert buffer.tolist() == [4, 5, 6, 7]


def test_gives_tensors_in_pieces(file):
    pieces = [bytes(piece) for piece in file.chunks("a", 20)]

    assert [len(piece) for piece in pieces] == [20, 20, 8]
    assert b"".join(pieces) == bytes_of(TENSORS["a"])
    assert list(file.chunks("b")) == []


def test_what_it_reads_cannot_be_changed(file):
    assert file.read("a").readonly


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (0, 49), (8, 4), (49, 49)])
def test_refuses_ranges_outside_the_tensor(file, start, stop):
    with pytest.raises(TensorFileError, match="it has 48"):
        file.read("a", start, stop)


def test_refuses_a_name_it_does_not_hold(file):
    with pytest.raises(TensorFileError, match="holds no tensor 'z'"):
        file.read("z")


def test_reads_from_several_threads_at_once(file):
    expected = bytes_of(TENSORS["a"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bytes(file.read("a")), range(200)))

    assert set(found) == {expected}


def test_a_file_cut_off_while_it_is_open_is_an_error(path):
    with TensorFile.open(path) as file:
        os.truncate(path, path.stat().st_size - 8)

        with pytest.raises(TensorFileError, match="became shorter"):
            file.read("c")


def test_follows_links_and_tells_files_apart(path, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())

    with TensorFile.open(path) as a, TensorFile.open(link) as b, TensorFile.open(copy) as c:
        assert a.identity == b.identity
        assert a.identity != c.identity


def test_closing_twice_is_fine_and_reading_then_is_not(path):
    file = TensorFile.open(path)

    file.close()
    file.close()

    with pytest.raises(InputError, match="cannot be read"):
        file.read("a")


def test_refuses_what_is_no_regular_file(tmp_path):
    pipe, listening = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))

        for path in (pipe, tmp_path):
            with pytest.raises(InputError, match="no regular file"):
                TensorFile.open(path)
        for path in (listening, tmp_path / "nothing"):
            with pytest.raises(InputError, match="cannot be opened"):
                TensorFile.open(path)


def test_limits_are_those_of_the_maker(tmp_path):
    path = tmp_path / "wide.safetensors"
    text = b"{" + b" " * ADAPTER_LIMITS.header_bytes + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)

    TensorFile.open(path).close()

    with pytest.raises(TensorFileError, match="at most"):
        TensorFile.from_bytes(path.read_bytes(), where="memory")
