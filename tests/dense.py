"""The oracle for PEFT's semantics: a saved adapter's changes put into a model's weights.

Written from PEFT's documentation and source, dense and slow, in one dtype; it shares no
code with lora_hub. With a float64 model it is the truth, with another one it is "the same
formula in plain torch".
"""

import math
import re

import torch
from safetensors.torch import load_file
from torch import nn

PREFIX = "base_model.model."


def put_in(model, folder, config, weight=1.0):
    """Change the model as the PEFT adapter in the folder says, in the model's dtype."""
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _replace(modules, tensors, config)
    for path in sorted({_path(name) for name in tensors if _is_factor(name)}):
        own = {
            name.removeprefix(f"{path}."): tensor
            for name, tensor in tensors.items()
            if _is_factor(name) and _path(name) == path
        }
        _change(modules, path, own, config, tensors)
    if weight != 1:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name] + weight * (tensor - before[name]))
    return model


def _is_factor(name):
    return re.search(r"\.(lora_|ia3_l|vera_lambda|hada_|lokr_)", name) is not None


def _path(name):
    return re.split(r"\.(?:lora_|ia3_l|vera_lambda|hada_|lokr_)", name)[0]


def _replace(modules, tensors, config):
    rows = config.get("trainable_token_indices") or config.get("token_indices")
    for name, tensor in tensors.items():
        if _is_factor(name) or name.startswith("base_model.vera_"):
            continue
        if ".original_module." in name:  # bias="all" saves what is not used, too
            continue
        path, _, last = name.rpartition(".")
        if last == "trainable_tokens_delta":
            path = path.removesuffix(".token_adapter")
            keep = rows if isinstance(rows, list) else rows[path.rpartition(".")[2]]
            parameter = modules[path].weight
            value = parameter.detach().clone()
            value[keep] = tensor.to(value.dtype)
        else:
            own = re.sub(r"\.base_layer$|\.modules_to_save(\.default)?(?=\.|$)", "", path)
            module = modules[own]
            parameter = getattr(module, last)
            value = tensor.to(parameter.dtype)
        parameter.data.copy_(value)


def _pattern(patterns, path, default):
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _scaling(config, path):
    rank = _pattern(config.get("rank_pattern"), path, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _change(modules, path, own, config, shared):
    depth = path.count(".base_layer")
    module = modules[path.replace(".base_layer", "")]
    targets = config.get("target_parameters") or []
    names = [
        name
        for name, _ in module.named_parameters(recurse=False)
        if any(f"{path.replace('.base_layer', '')}.{name}".endswith(t) for t in targets)
    ]
    if names:
        _experts(module, names[len(names) - 1 - depth], path, own, config)
    elif "ia3_l" in own:
        _ia3(module, path, own["ia3_l"], config)
    elif "vera_lambda_b" in own:
        _vera(module, own, shared)
    elif "lora_A.weight" not in own and "lora_embedding_A" not in own:
        _product(module, path, own, config)
    else:
        _lora(module, path, own, config)


def _experts(module, name, path, own, config):
    parameter = getattr(module, name)
    full = f"{path.replace('.base_layer', '')}.{name}"
    scale, rank = _scaling(config, full)
    a, b = (own[f"lora_{x}.weight"].to(parameter.dtype) for x in "AB")
    if parameter.dim() == 2:
        parameter.data += scale * (b @ a)
        return
    experts = parameter.shape[0]
    for e in range(experts):
        change = b[:, e::experts] @ a[e * rank : (e + 1) * rank]
        is_transposed = getattr(module, "is_transposed", False)
        parameter.data[e] += scale * (change.T if is_transposed else change)


def _ia3(module, path, vector, config):
    vector = vector.flatten().to(module.weight.dtype)
    transposed = type(module).__name__ == "Conv1D"
    tail = (1,) * (module.weight.dim() - 2)
    if path.endswith(tuple(config.get("feedforward_modules") or ())):
        shape = (-1, 1) if transposed else (1, -1, *tail)
        module.weight.data *= vector.reshape(shape)
        return
    module.weight.data *= vector.reshape((1, -1) if transposed else (-1, 1, *tail))
    if module.bias is not None:
        module.bias.data *= vector


def _lora(module, path, own, config):
    scale, _ = _scaling(config, path)
    weight = module.weight
    dtype = weight.dtype
    if "lora_embedding_A" in own:
        stored = (own["lora_embedding_B"].to(dtype) @ own["lora_embedding_A"].to(dtype)).T
        axes = (0,)
    else:
        a, b = (own[f"lora_{x}.weight"].to(dtype) for x in "AB")
        groups = a.shape[0] // b.shape[1]
        blocks = [
            part.flatten(1) @ rows.flatten(1)
            for part, rows in zip(b.chunk(groups), a.chunk(groups), strict=True)
        ]
        stored = torch.cat(blocks)
        axes = (1,)
        if weight.dim() > 2:
            stored = stored.reshape(len(stored), -1, *weight.shape[2:])
            axes = tuple(range(1, weight.dim()))
        if groups > 1:
            _ungroup(module, groups)
            weight = module.weight
        if type(module).__name__ == "Conv1D":
            stored, axes = stored.T, (0,)
    changed = weight.data + scale * stored
    if "lora_magnitude_vector" in own:
        norm = changed.pow(2).sum(axes, keepdim=True).sqrt()
        changed = (
            own["lora_magnitude_vector"].to(dtype).reshape(norm.shape) / norm * changed
        )
    weight.data.copy_(changed)
    if "lora_B.bias" in own:
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=dtype))
        module.bias.data += scale * own["lora_B.bias"].to(dtype)


def _vera(module, own, shared):
    dtype = module.weight.dtype
    transposed = type(module).__name__ == "Conv1D"
    out, inp = module.weight.T.shape if transposed else module.weight.shape
    a, b = (shared[f"base_model.vera_{x}"].to(dtype) for x in "AB")
    across, down = (own[f"vera_lambda_{x}"].to(dtype) for x in "bd")
    change = across[:, None] * (b[:out] @ (down[:, None] * a[:, :inp]))
    module.weight.data += change.T if transposed else change


def _product(module, path, own, config):
    """LoHa: elementwise product of two products; LoKr: Kronecker product."""
    own = {name: tensor.to(module.weight.dtype) for name, tensor in own.items()}
    scale = config["alpha"] / config["r"]
    weight = module.weight
    if "hada_w1_a" in own:
        left = own["hada_w1_a"] @ own["hada_w1_b"]
        change = left * (own["hada_w2_a"] @ own["hada_w2_b"])
        weight.data += scale * change.reshape(weight.shape)
        return
    one, two = (
        own[f"lokr_w{n}"]
        if f"lokr_w{n}" in own
        else own[f"lokr_w{n}_a"] @ own[f"lokr_w{n}_b"]
        for n in "12"
    )
    one = one.reshape(*one.shape, *(1 for _ in range(two.dim() - 2)))
    weight.data += scale * torch.kron(one, two).reshape(weight.shape)


def _ungroup(module, groups):
    """Make a grouped convolution one of all channels, its weight zero between groups."""
    old = module.weight.data
    out, each = old.shape[:2]
    whole = old.new_zeros(out, each * groups, *old.shape[2:])
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * each : (group + 1) * each] = old[rows]
    module.weight = nn.Parameter(whole)
    module.groups = 1
