"""Keep the shared filters that a meta-training learned, and nothing else of it.

configs/meta_128.yml learns the filters that everybody's decoder differences are made of, and with them where people
begin. The filters pay, the beginning does not: it moves everybody, those without a step included. This puts the
filters into the model that the training began from; who begins there begins as before, and steps go another way.

    python benchmarks/keep_filters.py BASE runs/meta_128/ema.safetensors -o runs/meta_128/kept.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure

from metagpen import load
from metagpen.errors import ConfigError
from metagpen.model import MetaGPEN


def with_filters_of(base: MetaGPEN, trained: MetaGPEN) -> MetaGPEN:
    """The base with the trained model's filters. Raises ConfigError where they are not for the same GPEN, or where the
    base has mixtures before any step, which would mean something else then."""
    if trained.bases is None:
        raise ConfigError("the meta-trained model shares no decoder filters; slow: [bases.*] learns them")
    begun = base.rule is not None and any(
        value.any() for name, value in base.rule.initial.items() if name.startswith("decoder"))
    if begun or (base.start is not None and base.start.mixtures is not None):
        raise ConfigError("the base begins with mixtures of its own filters; only one without them can change these")
    same = base.gpen.config == trained.gpen.config and all(
        a.equal(b) for a, b in zip(base.gpen.parameters(), trained.gpen.parameters(), strict=True))
    if not same:
        raise ConfigError("the meta-training did not begin from this base, or learned its weights, too")
    meta = {**trained.card.get("meta", {}), "kept": "the shared filters alone (benchmarks/keep_filters.py)"}
    return MetaGPEN(base.gpen, base.start, {**base.card, "filters": meta}, base.rule, trained.bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="what the training began from: a name or a file")
    parser.add_argument("trained", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = with_filters_of(load(arguments.base), MetaGPEN.from_file(arguments.trained))
    print(f"done: {result.save(arguments.output)}")


if __name__ == "__main__":
    measure.run(main)
