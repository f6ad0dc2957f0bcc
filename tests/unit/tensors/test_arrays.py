import pytest

from lora_hub.tensors.arrays import floats


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_floats_are_the_values_torch_reads(dtype):
    import torch
    from safetensors.torch import save

    theirs = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
    }[dtype]
    tensor = torch.randn(3, 5, dtype=torch.float64).to(theirs)
    data = save({"x": tensor})[-tensor.nbytes :]

    found = floats(data, dtype, (3, 5))

    assert (found.astype("f8") == tensor.double().numpy()).all()
