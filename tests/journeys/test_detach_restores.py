"""Attach, load, use, detach: the model is the object it was, to the last bit and module."""

import hashlib

from lora_hub.adapter.load import load
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.host import Host
from tests.builders import logits, tiny_adapter, tiny_model


def digests(model):
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def objects(model):
    """Return what the model is made of, by identity, and every attribute of its modules."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return (
        {name: id(module) for name, module in modules.items()},
        {name: (id(each), each.data_ptr()) for name, each in parameters.items()},
        {name: sorted(vars(module)) for name, module in modules.items()},
        {name: id(type(module).forward) for name, module in modules.items()},
        {name: len(module._forward_hooks) for name, module in modules.items()},
    )


def test_detaching_leaves_every_parameter_and_every_module_as_it_was(tmp_path):
    model = tiny_model()
    adapters = [
        load(open_adapter(tiny_adapter(tmp_path / "one"))),
        load(open_adapter(tiny_adapter(tmp_path / "two", targets=("up_proj", "q_proj")))),
    ]
    before = digests(model), objects(model), logits(model).tolist()

    host = Host(model)
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        host.load(adapter, as_=name)
    host.use("one")
    changed = logits(model).tolist()
    with host.using({"one": 0.5, "two": -2.0}):
        logits(model)
    host.use({"two": 1.0})
    logits(model)
    host.unload("one")
    host.detach()

    assert changed != before[2]
    assert (digests(model), objects(model), logits(model).tolist()) == before


def test_parameters_are_untouched_while_adapters_are_used(tmp_path):
    model = tiny_model()
    before = digests(model), objects(model)[:2]

    host = Host(model)
    host.load(load(open_adapter(tiny_adapter(tmp_path / "one"))), as_="one")
    host.use("one")
    logits(model)

    assert (digests(model), objects(model)[:2]) == before
