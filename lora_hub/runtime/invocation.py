"""Where an aLoRA acts: from the last occurrence of its invocation tokens on, row by row.

The tokens are seen where the model is called, and kept until it returns. A model that goes
on from a cache is not given the earlier tokens again: where the adapter acted when the
cache was made, it acts on all that follows; what is generated is not searched. As PEFT
does.

Source: Greenewald et al. 2025, arXiv:2504.12397; PEFT 0.21.2, `lora/variants.py`.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lora_hub.errors import InputError


class Invocation:
    """The tokens that wake an adapter, and where they stand in what the model is given.

    Args:
        tokens: the invocation sequence, at least one token.
        where: what to call the adapter in messages.
    """

    def __init__(self, tokens: tuple[int, ...], *, where: str) -> None:
        self._tokens = tokens
        self._where = where
        self._mask: Tensor | None = None  # (rows, tokens) of the call that runs now
        # A cache → which rows were awake at its end; a cache is known by what it is.
        self._awake: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def before(
        self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """See what the model is given; called by torch before its forward.

        Raises:
            InputError: it is given no tokens, or a cache nobody saw being made.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise InputError(
                "the adapter acts from its invocation tokens on, and the model was called "
                "without input_ids of shape (rows, tokens)",
                where=self._where,
                hint="call the model with input_ids; inputs_embeds do not tell the tokens",
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            awake = self._awake.get(cache)
            if awake is None or len(awake) != len(ids):
                raise InputError(
                    "the model goes on from a cache that was made while the adapter was "
                    "not used, or with other rows",
                    where=self._where,
                    hint="call the model with all tokens, without past_key_values",
                )
            self._mask = awake.to(ids.device)[:, None].expand(ids.shape)
        else:
            self._mask = awake_from(ids, self._tokens)

    def after(self, _model: nn.Module, _args: object, _kwargs: object, output: Any) -> None:
        """Keep for the cache which rows are awake; called by torch after the forward."""
        mask, self._mask = self._mask, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and mask is not None:
            self._awake[cache] = mask[:, -1]

    def gate(self, output: Tensor) -> Bool[Tensor, "..."]:
        """Return where in a layer's output the adapter acts, ready to broadcast.

        Raises:
            InputError: the layer runs outside of the model's forward, or its output does
                not tell rows and tokens.
        """
        mask = self._mask
        if mask is None:
            raise InputError(
                "the adapter acts from its invocation tokens on, and a part of the model "
                "was called by itself",
                where=self._where,
                hint="call the whole model, or use another adapter",
            )
        mask = mask.to(output.device)
        if output.dim() == 3 and output.shape[0] == len(mask):
            if output.shape[1] <= mask.shape[1]:  # some layers see the last tokens alone
                return mask[:, mask.shape[1] - output.shape[1] :, None]
        elif output.dim() == 2 and output.shape[0] == mask.numel():
            return mask.reshape(-1, 1)
        raise InputError(
            f"a layer gives {list(output.shape)} for tokens of {list(mask.shape)}, so "
            "where the adapter acts is not known",
            where=self._where,
        )


def awake_from(
    ids: Int[Tensor, "rows tokens"], sequence: tuple[int, ...]
) -> Bool[Tensor, "rows tokens"]:
    """Return which tokens stand at or after the last occurrence of the sequence."""
    awake = torch.zeros_like(ids, dtype=torch.bool)
    length = len(sequence)
    if ids.shape[1] < length:
        return awake
    windows = ids.unfold(1, length, 1) == torch.tensor(sequence, device=ids.device)
    starts = windows.all(dim=2)
    positions = torch.arange(starts.shape[1], device=ids.device)
    last = torch.where(starts, positions, -1).amax(dim=1, keepdim=True)
    tokens = torch.arange(ids.shape[1], device=ids.device)
    return (tokens >= last) & (last >= 0)
