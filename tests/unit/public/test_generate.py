"""What `lorahub run` does with bases and prompts that are not what they should be."""

import json

import pytest

from lora_hub.errors import InputError
from lora_hub.public.generate import generate
from tests.builders import VOCABULARY, tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tiny_base(tmp_path_factory.mktemp("base") / "base")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def base(original, tmp_path):
    import shutil

    return shutil.copytree(original, tmp_path / "base")


def text_of(base, prompt="w3 w5", **changes):
    plain = {
        "adapters": (),
        "registry": None,
        "tokens": 2,
        "repetition_penalty": 1.2,
        "dtype": None,
        "device": "cpu",
        "note": lambda _text: None,
    }
    return generate(prompt, base=base, **plain | changes)


def edit_config(base, **changes):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_goes_on_from_the_prompt(base):
    assert text_of(base).text.startswith("w3 w5 ")


def test_weights_of_an_adapter_that_is_named_twice_add(base, tmp_path):
    adapter = str(tiny_adapter(tmp_path / "adapter"))

    result = text_of(base, adapters=[(adapter, 0.5), (adapter, 0.25)])

    assert result.adapters == ((adapter, 0.75),)


def test_a_base_without_all_its_tensors_is_refused(base):
    edit_config(base, num_hidden_layers=3)

    with pytest.raises(InputError, match=r"9 tensors .* model\.layers\.2\."):
        text_of(base)


def test_code_of_the_base_is_never_run(base, tmp_path):
    ran = tmp_path / "ran"
    (base / "mine.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    edit_config(
        base,
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )

    with pytest.raises(InputError):
        text_of(base)

    assert not ran.exists()


def test_a_base_that_transformers_does_not_know_is_refused(base):
    edit_config(base, model_type="unheard-of")

    with pytest.raises(InputError, match="unheard-of"):
        text_of(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"repetition_penalty": 0.0}, "penalty is 0.0"),
        ({"repetition_penalty": float("nan")}, "penalty is nan"),
        ({"device": "nowhere"}, "device cannot be used"),
        ({"device": "meta"}, "device cannot be used"),
    ],
)
def test_refuses_what_nothing_can_be_generated_with(base, changes, message):
    with pytest.raises(InputError, match=message):
        text_of(base, **changes)
