"""Who judges: a recogniser that scores must not have been in a loss, or its figures flatter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from metagpen.errors import ConfigError
from metagpen.recognise import Recogniser
from metagpen.tensors import digest_of

IN_LOSSES = "in losses"  # a recogniser that a loss saw must say so in its label


def say_who_is_in_losses(scorers: Mapping[str, Any], losses: Iterable[Any], models: Iterable[Any] = ()) -> None:
    """Raises ConfigError when a scorer is a recogniser of the losses, those that trained the models included (their
    cards say which), and its label does not own up to it. A scorer is known by its name, and by its weights under
    another one."""
    losses = [one for one in losses if one is not None]
    names, weights = {name_of(one) for one in losses}, {weights_of(one) for one in losses}
    for model in models:
        for value in recognisers_of_card({"recogniser": "embedded", **getattr(model, "card", {})}):
            file = Path(value)
            names |= {value, file.name, file.stem, file.name.split(".")[0]}  # however its loader calls it
    for label, net in scorers.items():
        if (name_of(net) in names - {None} or weights_of(net) in weights - {None}) and IN_LOSSES not in label:
            raise ConfigError(
                f"recogniser '{label}' is also in the losses, so its figures flatter; score with another "
                f"one, or say '{label} ({IN_LOSSES})'"
            )


def is_one_of(net: Any, others: Iterable[Any]) -> bool:
    """Whether a network is one of these, by its name, or by its weights under another one."""
    return any(name_of(net) == name_of(one) or weights_of(net) == weights_of(one) for one in others)


def recognisers_of_card(card: Mapping[str, Any]) -> Iterator[str]:
    """Names or files of the recognisers that a model was trained with, also before its last training."""
    for key, value in card.items():
        if isinstance(value, Mapping):
            yield from recognisers_of_card(value)
        elif key in ("recogniser", "loss_recogniser") and value:
            yield str(value)


def name_of(net: Any) -> str | None:
    return getattr(net, "name", None)


def weights_of(net: Any) -> str | None:
    """Twelve hex digits of the SHA-256 over a network's weights; None for an embedder that is no network."""
    if isinstance(net, Recogniser):
        return net.digest[:12]
    return digest_of(net.state_dict())[:12] if isinstance(net, torch.nn.Module) else None


def network_fingerprint(net: Any) -> str:
    """A recogniser's name and what its weights are known by."""
    return f"{name_of(net) or 'unnamed'} {weights_of(net) or 'elsewhere'}"
