"""Do the base's targets in a manifest follow from what it says of the adapter?

A loader compares the tensors in `base.targets` and no others, so every tensor that the
adapter changes must be among them, and nothing else.
"""

from collections.abc import Mapping

from lora_hub.base.orientation import stores_transposed, weight_shape
from lora_hub.base.structure import same_shape
from lora_hub.errors import DocumentError
from lora_hub.manifest.document import BaseTarget, ExtraTensor, Manifest, Module
from lora_hub.recent import RecentOfSame

_RECENT: RecentOfSame[bool] = RecentOfSame()


def check_targets(manifest: Manifest, where: str) -> None:
    """Raise `DocumentError` unless the base's targets are what the adapter changes.

    A bias that the base does not have, and a tensor that is brought whole and is new, are
    no targets.
    """
    if _RECENT.get(manifest.adapter, manifest.base):
        return
    targets = {target.name: target for target in manifest.base.targets}
    if len(targets) != len(manifest.base.targets):
        raise DocumentError("a target is listed twice", where=f"{where}#/base/targets")
    extra = {one.name: one for one in manifest.adapter.extra_tensors}
    if len(extra) != len(manifest.adapter.extra_tensors):
        raise DocumentError(
            "a tensor is listed twice", where=f"{where}#/adapter/extra_tensors"
        )
    weights = set()
    for index, module in enumerate(manifest.adapter.modules):
        at = f"{where}#/adapter/modules/{index}"
        _check_module(module, targets, extra, manifest.base.config.model_type, at)
        if module.weight in weights:
            raise DocumentError(f"{module.module} is listed twice", where=at)
        weights.add(module.weight)
    for index, one in enumerate(manifest.adapter.extra_tensors):
        at = f"{where}#/adapter/extra_tensors/{index}"
        _check_extra(one, targets.get(one.name), at)
    biases = {f"{m.module}.bias" for m in manifest.adapter.modules if m.bias}
    for name in sorted(targets.keys() - weights - biases - extra.keys()):
        raise DocumentError(
            f"nothing in the adapter modifies {name}", where=f"{where}#/base/targets"
        )
    _RECENT.keep(manifest.adapter, manifest.base, result=True)


def _check_module(
    module: Module,
    targets: Mapping[str, BaseTarget],
    extra: Mapping[str, ExtraTensor],
    model_type: str | None,
    at: str,
) -> None:
    is_transposed = stores_transposed(module.layer, module.module, model_type)
    made = weight_shape(
        module.layer, module.rank, module.a, module.b, is_transposed=is_transposed
    )
    if made is None:
        raise DocumentError(
            f"the shapes {list(module.a)} and {list(module.b)} are not those of factors of "
            f"rank {module.rank} for the layer {module.layer}",
            where=at,
        )
    if (module.layer == "experts") != (module.experts is not None) or (
        module.experts is not None and module.experts * module.rank != module.a[0]
    ):
        raise DocumentError(
            f"experts is {module.experts}, the factors are those of "
            f"{module.a[0] // module.rank if module.layer == 'experts' else 'none'}",
            where=at,
        )
    target = targets.get(module.weight)
    if target is None:
        replaced = extra.get(module.weight)
        if replaced is None or replaced.rows is not None:
            raise DocumentError(
                f"{module.module} is not among the base's targets, or listed twice",
                where=at,
            )
        shape = replaced.shape
    else:
        shape = target.shape
    if not same_shape(module.layer, shape, made):
        raise DocumentError(
            f"the factors make {list(made)}, the base's weight is {list(shape)}", where=at
        )


def _check_extra(one: ExtraTensor, target: BaseTarget | None, at: str) -> None:
    if target is None:
        if one.rows is not None or one.role == "bias":
            raise DocumentError(f"{one.name} is not among the base's targets", where=at)
        return
    if one.rows is None:
        if one.shape != target.shape:
            raise DocumentError(
                f"the tensor is {list(one.shape)}, the base's is {list(target.shape)}",
                where=at,
            )
    elif one.shape != (len(one.rows), *target.shape[1:]) or not all(
        row < target.shape[0] for row in one.rows
    ):
        raise DocumentError(
            f"{len(one.rows)} rows of {list(target.shape)} are no {list(one.shape)}",
            where=at,
        )
