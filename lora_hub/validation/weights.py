"""Findings about the numbers in an adapter."""

from lora_hub.formats.source import AdapterSource
from lora_hub.tensors import arrays
from lora_hub.validation.findings import Finding, finding


def check_numbers(source: AdapterSource) -> list[Finding]:
    """Return findings about values that are not finite, and about a no-op.

    Reads each factor once. Some zero factors b are normal, in layers that never learned.
    """
    import numpy as np

    found = []
    is_no_op = True
    for update in source.updates:
        for info in (update.a, update.b):
            data = source.tensors.read(info.name)
            values = arrays.floats(data, info.dtype, info.shape)
            bad = values.size - int(np.isfinite(values).sum())
            if bad:
                found.append(
                    finding(
                        "LH030",
                        f"{source.tensors.where}: {info.name}",
                        f"{bad} of {values.size} numbers are NaN or infinite",
                    )
                )
            if info is update.b:
                is_no_op = is_no_op and not values.any()
    if is_no_op:
        found.append(
            finding("LH031", source.tensors.where, "every factor b is zero throughout")
        )
    return found
