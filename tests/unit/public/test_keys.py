"""Key files are made once and never overwritten."""

import pytest

from lora_hub.errors import StoreError
from lora_hub.public.keys import keygen


@pytest.mark.parametrize("out", [".", "/", ""])
def test_a_key_needs_a_file_of_its_own(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(StoreError, match="exists already"):
        keygen(out)

    assert list(tmp_path.iterdir()) == []
