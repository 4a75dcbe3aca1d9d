"""Finds the network in the nested dicts that trainers write, below the names that wrappers add to its keys."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["find_network", "without_wrappers"]

#: Parts of keys that come from torch.compile, from data parallelism and from activation checkpointing.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

#: The first part of a key that names a layer, in this package's names and in the published ones. A prefix may end
#: anywhere: "student_stages.0." too.
LAYER = re.compile(r"(?:patch_embed|stages|blocks[123])\.\d+\.")

#: The name of a moving average: ema, model_ema, state_dict_ema, ema_model, ... and net_E of the published files.
AVERAGE = re.compile(r"(?:^|[._])(?:[Ee][Mm][Aa]|net_E)(?:$|[._])")

MAX_DEPTH = 5  # dicts inside dicts; a damaged file may hold a dict that contains itself


def without_wrappers(key: str) -> str:
    """``key`` without the parts that wrappers of modules add."""
    return WRAPPERS.sub("", key)


def find_network(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict of the one network in ``content``, with the keys of the bare network.

    It may be inside other dicts, beside other things, and its keys may have a prefix. Of a network and its moving
    average the average is taken. A dict of tensors without any layer of a network is returned as it is.

    Raises:
        ValueError: ``content`` has no tensors, or several networks; the message names them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for place, tensors in _dicts_of_tensors(content, ()):
        for prefix, network in _by_prefix(tensors).items():
            found[".".join([*place, *prefix.split(".")]).strip(".") or "the top level"] = network
    if not found:
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): tensor for key, tensor in content.items()}
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"expected a state dict of tensors, also inside other dicts, got {keys}")
    # other networks, such as a teacher, may have layers of the same names, but no mixers
    ours = {name: network for name, network in found.items() if any(".mixer." in key for key in network)} or found
    averages = [name for name in ours if AVERAGE.search(name)]
    if len(ours) == 2 and len(averages) == 1:
        return ours[averages[0]]
    if len(ours) > 1:
        raise ValueError(f"expected one network, got {len(ours)}: {', '.join(ours)}; save the state_dict() of one")
    return next(iter(ours.values()))


def _dicts_of_tensors(content: Mapping[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """``content`` and the dicts in it that have tensors, with the names on the way to them."""
    yield place, {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(place) < MAX_DEPTH:
            yield from _dicts_of_tensors(value, (*place, key))


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks in one dict by the prefix of their keys. Keys that belong to no network are left out."""
    prefixes = {key[: match.start()] for key in tensors if (match := LAYER.search(key))}
    networks: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in sorted(prefixes, key=len, reverse=True)}
    for key, tensor in tensors.items():
        for prefix, network in networks.items():  # the longest first
            if key.startswith(prefix):
                network[without_wrappers(key.removeprefix(prefix))] = tensor
                break
    return networks
