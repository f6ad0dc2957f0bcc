"""lora_hub: package, sign, publish, apply, compose and merge LoRA adapters.

    host = lora_hub.attach(model, registry="./registry")
    host.load("style/shakespeare@~=1.0")
    host.use("style/shakespeare")

Each public name is imported when it is first used, so that packaging never loads torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_hub.adapter.adapter import Adapter
    from lora_hub.errors import LoraHubError
    from lora_hub.public.models import attach, compose, load_adapter, merge
    from lora_hub.public.packaging import pack, sign, validate, verify
    from lora_hub.public.publishing import pull, push
    from lora_hub.runtime.host import Host

_HOMES = {
    "Adapter": "lora_hub.public.models",
    "Host": "lora_hub.public.models",
    "LoraHubError": "lora_hub.errors",
    "attach": "lora_hub.public.models",
    "compose": "lora_hub.public.models",
    "load_adapter": "lora_hub.public.models",
    "merge": "lora_hub.public.models",
    "pack": "lora_hub.public.packaging",
    "pull": "lora_hub.public.publishing",
    "push": "lora_hub.public.publishing",
    "sign": "lora_hub.public.packaging",
    "validate": "lora_hub.public.packaging",
    "verify": "lora_hub.public.packaging",
}

__all__ = [
    "Adapter",
    "Host",
    "LoraHubError",
    "__version__",
    "attach",
    "compose",
    "load_adapter",
    "merge",
    "pack",
    "pull",
    "push",
    "sign",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lora_hub' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
