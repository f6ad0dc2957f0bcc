"""Which modules PEFT means by a config: its match rules, to the letter.

The tensors say what was adapted, and the config must mean the same: a module that the
config leaves out PEFT drops in silence, and an entry that matches nothing tells of an
incomplete file. Both are refused.

Source: PEFT 0.21.2, `utils/other.py:get_pattern_key`,
`tuners/tuners_utils.py:check_target_module_exists` and `_inject_parameters`. The author's
regular expressions are matched by `patterns.py`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.patterns import COMPILING, Budget, Pattern

_DIGITS = 18  # of a layer's number; Python refuses to read thousands of them
# Up to so many names in a list, looking for each is faster than taking every path apart.
_FEW = 64
# So many characters of a path does `re` pass in the time of a step, one at a time.
_PER_STEP = 16
_LAYERS_NAME = re.compile(r"\w+(\\?\.\w+)*")

# Modules that PEFT itself adds to modules_to_save, by task type.
HEADS: Mapping[str | None, tuple[str, ...]] = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names by which PEFT finds the modules that it saves whole."""
    listed = config.get("modules_to_save") or ()
    return tuple(dict.fromkeys((*listed, *HEADS.get(config.get("task_type"), ()))))


def expand(
    config: Mapping[str, Any],
    pattern: str,
    key: str,
    default: float,
    names: list[str],
    where: str,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Return name → the value of the first pattern that matches, else the plain value.

    Args:
        config: checked by `check_config`.
        pattern: the key with the patterns, `rank_pattern`.
        key: the key with the plain value, `r`.
        default: the plain value where the config is silent.
        names: paths of modules, for experts of their parameters.
        where: the config's path, for messages.
        budget: shared by all that is matched for one config; one of its own without.

    Raises:
        FormatError: a pattern matches none of the names.
    """
    budget = budget or Budget()
    patterns = {
        text: (
            Pattern(
                rf"(.*\.)?({text})$", text=text, where=f"{where}#/{pattern}", budget=budget
            ),
            value,
        )
        for text, value in (config.get(pattern) or {}).items()
    }
    for text, (expression, _) in patterns.items():
        if not any(expression.is_match(name) for name in names):
            raise FormatError(
                f"the key {text!r} of {pattern} matches no module in the weights",
                where=where,
                hint="remove it, or save the adapter again: PEFT ignores it in silence",
            )
    plain = config.get(key, default)
    if not patterns:
        return dict.fromkeys(names, plain)
    return {
        name: next(
            (value for expression, value in patterns.values() if expression.is_match(name)),
            plain,
        )
        for name in names
    }


def check_targets(
    config: Mapping[str, Any],
    keys: list[str],
    where: str,
    saved: Collection[str] = (),
    budget: Budget | None = None,
) -> None:
    """Raise `FormatError` unless target_modules names exactly the modules in the weights.

    Args:
        config: checked by `check_config`.
        keys: the modules' paths as PEFT sees them; not those of parameters.
        where: the config's path, for messages.
        saved: paths of modules that are saved whole, which PEFT leaves out of the
            targets though they may be listed.
        budget: as for `expand`.
    """
    budget = budget or Budget()
    targets = config.get("target_modules")
    is_excluded = _matcher(
        config.get("exclude_modules") or [], f"{where}#/exclude_modules", budget
    )
    if isinstance(targets, list):
        unmatched = _unmatched(targets, (*keys, *saved))
        for entry in unmatched:
            if is_excluded(entry):
                continue  # as PEFT writes out "all-linear" beside exclude_modules
            if config.get("layers_to_transform") is not None:
                continue  # PEFT lets an entry be that names modules of no layer
            raise FormatError(
                f"target_modules lists {entry!r}, and the weights hold no such module",
                where=where,
                hint="the file may be incomplete, or belong to another config",
            )
    is_listed = _matcher(_anything_or(targets), f"{where}#/target_modules", budget)
    is_in_layer = _layer_matcher(config, f"{where}#/layers_pattern", budget)
    is_saved = _saved_matcher(saved_names(config), f"{where}#/modules_to_save", budget)
    for key in keys:
        if is_excluded(key) or not is_listed(key) or not is_in_layer(key):
            raise FormatError(
                f"the weights hold {key}, which the config's target_modules, "
                "exclude_modules or layers_to_transform leaves out: PEFT would drop it in "
                "silence",
                where=where,
            )
        if is_saved(key):
            raise FormatError(
                f"the weights hold factors of {key}, a module that is saved whole "
                "(modules_to_save): PEFT leaves it out of the targets and would drop them "
                "in silence",
                where=where,
            )


def parameters_of(
    config: Mapping[str, Any],
) -> Callable[[str], tuple[frozenset[str], frozenset[str]]]:
    """Return what gives a module's parameters that target_parameters names, and may name.

    An entry means every parameter whose full name ends with it in whole dotted parts. One
    without a dot means parameters of any module, of which this one may have none.
    """
    named: dict[str, set[str]] = {}
    for entry in config.get("target_parameters") or ():
        module, _, parameter = entry.rpartition(".")
        named.setdefault(module, set()).add(parameter)
    bare = frozenset(named.pop("", ()))

    def at(key: str) -> tuple[frozenset[str], frozenset[str]]:
        endings = _endings(key) if named else ()
        return frozenset().union(*(named.get(ending, ()) for ending in endings)), bare

    return at


def module_matcher(
    config: Mapping[str, Any], where: str, budget: Budget | None = None
) -> Callable[[str], bool]:
    """Return whether target_modules lists a module, beside target_parameters."""
    targets = config.get("target_modules")
    chosen = [] if targets is None else _anything_or(targets)
    return _matcher(chosen, f"{where}#/target_modules", budget or Budget())


def check_parameters(config: Mapping[str, Any], names: Collection[str], where: str) -> None:
    """Raise `FormatError` unless each entry of target_parameters is among the names."""
    entries = dict.fromkeys(config.get("target_parameters") or ())
    found = _among(entries, names) if entries else ()
    for entry in entries:
        if entry not in found:
            raise FormatError(
                f"target_parameters lists {entry!r}, and the weights hold no such thing",
                where=where,
                hint="the file may be incomplete, or belong to another config",
            )


def excluded_by(saved: Collection[str], keys: Collection[str]) -> str | None:
    """Return one of the targets that PEFT leaves out for the names saved whole, or None."""
    is_saved = _saved_matcher(saved, "modules_to_save", Budget())
    return next((key for key in keys if is_saved(key)), None)


def _anything_or(targets: Any) -> Any:
    is_shorthand = isinstance(targets, str) and targets.lower() == "all-linear"
    return ".*" if targets is None or is_shorthand else targets


def _matcher(chosen: Any, where: str, budget: Budget) -> Callable[[str], bool]:
    if isinstance(chosen, str):
        return Pattern(chosen, where=where, budget=budget, whole=True).is_match
    names = frozenset(chosen)
    if len(names) > _FEW:
        return lambda key: key in names or not names.isdisjoint(_endings(key))
    tails = tuple(f".{name}" for name in names)
    return lambda key: key in names or key.endswith(tails)


def _unmatched(entries: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Return the entries of a list that mean none of the modules."""
    whole = set(keys)
    unmatched = [entry for entry in dict.fromkeys(entries) if entry not in whole]
    if len(unmatched) > _FEW:
        found = _among(frozenset(unmatched), keys)
        return [entry for entry in unmatched if entry not in found]
    return [
        entry for entry in unmatched if not any(key.endswith(f".{entry}") for key in keys)
    ]


def _among(entries: Collection[str], names: Iterable[str]) -> set[str]:
    """Return the entries that are whole dotted parts at the end of a name."""
    return {ending for name in names for ending in _endings(name) if ending in entries}


def _saved_matcher(
    names: Collection[str], where: str, budget: Budget
) -> Callable[[str], bool]:
    # Here PEFT reads the names as regular expressions, and elsewhere as endings.
    patterns = [
        Pattern(rf"(^|.*\.){name}($|\..*)", text=name, where=where, budget=budget)
        for name in names
    ]
    return lambda key: any(pattern.is_match(key) for pattern in patterns)


def _endings(key: str) -> list[str]:
    """Return the names by which a list can mean a module: whole dotted parts at its end."""
    starts = [0, *(index + 1 for index, character in enumerate(key) if character == ".")]
    return [key[start:] for start in starts]


def _layer_matcher(
    config: Mapping[str, Any], where: str, budget: Budget
) -> Callable[[str], bool]:
    layers = config.get("layers_to_transform")
    targets = config.get("target_modules")
    if layers is None or layers == [] or not isinstance(targets, list):
        return lambda key: True
    patterns = config.get("layers_pattern") or []
    texts = [patterns] if isinstance(patterns, str) else patterns
    for text in texts:
        # Which of several numbers an expression finds first, only `re` can tell.
        if not _LAYERS_NAME.fullmatch(text):
            raise FormatError(
                f"{text[:60]!r} is no plain name, others are not read yet", where=where
            )
        budget.spend(COMPILING, text, where)
    expressions = {
        text: re.compile(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.") for text in texts
    } or {"": re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")}
    chosen = {layers} if isinstance(layers, int) else set(layers)
    whole = set(targets)

    def is_chosen(key: str) -> bool:
        if key in whole:
            return True  # a module listed by its whole path is meant, whatever its layer
        for text, expression in expressions.items():
            budget.spend(1 + len(key) // _PER_STEP, text, where)
            match = expression.match(key)
            if match:
                digits = match["idx"]
                return len(digits) <= _DIGITS and int(digits) in chosen
        return False

    return is_chosen
