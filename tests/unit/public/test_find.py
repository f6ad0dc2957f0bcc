"""What a user types, and what cannot be found."""

import pytest

from lora_hub.errors import InputError, LoraHubError
from lora_hub.public.find import find


@pytest.mark.parametrize("what", ["./" + "a" * 5000, "~no-such-user/adapter"])
def test_an_impossible_path_is_an_error_of_ours(what):
    with pytest.raises(InputError):
        find(what)


def test_a_name_without_a_registry_says_what_to_do():
    with pytest.raises(LoraHubError, match="no registry was named"):
        find("style/milton")
