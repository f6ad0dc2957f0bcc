"""Where an aLoRA acts: from the last occurrence of its invocation tokens on, row by row.

The tokens are seen where the model is called, and what they tell is kept in that call's
`Step` (`awake`), for each invocation sequence once, so that several aLoRAs and several
threads do not meet. A model that goes on from a cache is not given the earlier tokens
again: where the sequence stood when the cache was made, the adapter acts on all that
follows; what is generated is not searched. As PEFT does.

Source: Greenewald et al. 2025, arXiv:2504.12397; PEFT 0.21.2, `lora/variants.py`.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lora_hub.errors import InputError

Tokens = tuple[int, ...]
Awake = Mapping[Tokens, Tensor]  # invocation tokens → (rows, tokens), where they woke it

# What moves the rows of a cache, and how the rows that are awake move with them.
_MOVES: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, order: rows[order.to(rows.device)],
    "batch_select_indices": lambda rows, order: rows[order.to(rows.device)],
    "batch_repeat_interleave": lambda rows, times: rows.repeat_interleave(times),
}


class Invocations:
    """Which rows of which cache are awake, for one model.

    A cache is known by what it is, not by what it holds, and forgotten with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: WeakKeyDictionary[Any, dict[Tokens, Tensor]] = WeakKeyDictionary()

    def seen(
        self,
        sequences: Mapping[Tokens, str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> dict[Tokens, Tensor]:
        """Return for each sequence where it woke its adapters: a call's `Step.awake`.

        Args:
            sequences: invocation tokens → what to call the adapter in messages.
            args: what the model is called with.
            kwargs: what it is called with by name.

        Raises:
            InputError: it is given no tokens, or a cache nobody saw being made.
        """
        if not sequences:
            return {}
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise InputError(
                "the adapter acts from its invocation tokens on, and the model was called "
                "without input_ids of shape (rows, tokens)",
                where=next(iter(sequences.values())),
                hint="call the model with input_ids; inputs_embeds do not tell the tokens",
            )
        cache = kwargs.get("past_key_values")
        if not _length(cache):
            return {tokens: awake_from(ids, tokens) for tokens in sequences}
        with self._lock:
            known = dict(self._known(cache))
        found = {}
        for tokens, where in sequences.items():
            rows = known.get(tokens)
            if rows is None or len(rows) != len(ids):
                raise InputError(
                    "the model goes on from a cache that was made while the adapter was "
                    "not used, or with other rows",
                    where=where,
                    hint="call the model with all tokens, without past_key_values",
                )
            found[tokens] = rows.to(ids.device)[:, None].expand(ids.shape)
        return found

    def keep(self, awake: Awake, output: Any) -> None:
        """Keep for the cache in the output which rows are awake at its end.

        Args:
            awake: of the call that gave the output.
            output: of the model; without a cache nothing is to be kept.
        """
        cache = getattr(output, "past_key_values", None)
        if cache is None or not awake:
            return
        ends = {tokens: mask[:, -1].clone() for tokens, mask in awake.items()}
        with self._lock:
            try:
                self._caches[cache] = ends
            except TypeError:  # a tuple: going on from one is refused by name
                return
        if not all(bool(rows.all()) or not rows.any() for rows in ends.values()):
            self._follow(cache)

    def _known(self, cache: Any) -> Mapping[Tokens, Tensor]:
        try:
            return self._caches.get(cache) or {}
        except TypeError:
            return {}

    def _follow(self, cache: Any) -> None:
        """See the rows of a cache be moved, as by beam search: who is awake moves along."""
        for name in _MOVES:
            given = getattr(cache, name, None)
            if given is not None and name not in vars(cache):
                # A bound method, so that a deep copy of the cache moves its own rows.
                setattr(cache, name, MethodType(_moving(name, self), cache))

    def _move(self, cache: Any, name: str, argument: Any) -> None:
        with self._lock:
            known = self._known(cache)
            moved = {tokens: _MOVES[name](rows, argument) for tokens, rows in known.items()}
            if moved:
                self._caches[cache] = moved


def gate(awake: Bool[Tensor, "rows tokens"], output: Tensor, *, where: str) -> Tensor:
    """Return where in a layer's output the adapter acts, ready to broadcast.

    It has the output's leading axes, one or two of them, and a 1: what picks some rows of
    the output picks those of the gate.

    Args:
        awake: of the call that runs, from `Step.awake`.
        output: (rows, tokens, out), some layers see the last tokens alone; or rows and
            tokens in one axis.
        where: what to call the adapter in messages.

    Raises:
        InputError: the output does not tell rows and tokens.
    """
    awake = awake.to(output.device)
    if output.dim() == 3 and output.shape[0] == len(awake):
        if output.shape[1] <= awake.shape[1]:
            return awake[:, awake.shape[1] - output.shape[1] :, None]
    elif output.dim() == 2 and output.shape[0] == awake.numel():
        return awake.reshape(-1, 1)
    raise InputError(
        f"a layer gives {list(output.shape)} for tokens of {list(awake.shape)}, so "
        "where the adapter acts is not known",
        where=where,
    )


def by_itself(where: str) -> InputError:
    """Return the error of a layer that runs outside of the model's forward."""
    return InputError(
        "the adapter acts from its invocation tokens on, and a part of the model was "
        "called by itself",
        where=where,
        hint="call the whole model, or use another adapter",
    )


def sequences_of(adapters: Iterable[tuple[str, Tokens]]) -> dict[Tokens, str]:
    """Return invocation tokens → the first adapter's name, of those that have any."""
    found: dict[Tokens, str] = {}
    for name, tokens in adapters:
        if tokens:
            found.setdefault(tokens, name)
    return found


def awake_from(
    ids: Int[Tensor, "rows tokens"], sequence: Tokens
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


def _length(cache: Any) -> int:
    """Return how many tokens a cache holds; one that does not say holds some."""
    if cache is None:
        return 0
    ask = getattr(cache, "get_seq_length", None)
    return int(ask()) if callable(ask) else 1


def _moving(name: str, invocations: Invocations) -> Any:
    def moving(cache: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(type(cache), name)(cache, *args, **kwargs)
        invocations._move(cache, name, (*args, *kwargs.values())[0])  # noqa: SLF001
        return given

    return moving
