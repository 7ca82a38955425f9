"""From a fine-tuned model's file back to what it was fine-tuned from, so that its strength can be chosen."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..model import MetaGPEN
from ..person import Person
from ..weights import load


def person_behind(path: str | Path, model: MetaGPEN) -> Person | None:
    """The Person that was folded into `net_g_….safetensors` of `metagpen train -opt`, on the model begun from.

    path, model: the file and what it holds. None for a model that was not fine-tuned. The Person's own file must lie
    beside the model's, and the model begun from must still be where it was. Raises CheckpointError otherwise.
    """
    made = model.card.get("fine_tuned")
    if made is None:
        return None
    advice = f"{path}: a strength between generic and personal needs the model that it was fine-tuned from"
    try:
        advice += f" and {made['person']} beside it"
        base = load(made["from"], device=model.device)
        if base.fingerprint != made["fingerprint"]:
            raise CheckpointError(f"{made['from']} is another model now")
        return Person.load(Path(path).with_name(made["person"]), base)
    except (CheckpointError, KeyError, TypeError, ValueError) as error:  # a card written by hand can say anything
        raise CheckpointError(f"{advice} ({error})") from None
