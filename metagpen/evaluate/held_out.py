"""Whom a measurement is of: people of one split, nobody and no photo of whom the training saw."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator

from metagpen import identities
from metagpen.config import Config, Device
from metagpen.errors import ConfigError, DataError
from metagpen.identities import People


class MeasureConfig(Config):
    """Whom, by which recognisers and where: what `metagpen evaluate` and `metagpen curve` both ask for."""

    data: str = Field(description="folder with one sub-folder per person, or what `layout` says")
    layout: str = Field("folder", description="of `data` and `trained_on`: a name that `identities.load_people` knows")
    split_file: str | None = Field(None, description="CSV that assigns people to splits; none: all people")
    split: str = Field("val", description="the split to measure, with split_file")
    trained_on: list[str] = Field([], description="folders of training people (with split_file: those in "
                                                  "`trained_parts` of it); nobody and no photo of them is measured")
    trained_parts: list[str] = Field(["train"], description="splits that any part of the training saw, e.g. kept too")
    max_people: int | None = Field(None, ge=1, description="only the first people, for a quick look")
    recognisers: dict[str, str] = Field(
        {"embedded (in losses)": "embedded"},
        min_length=1,
        description="label -> recogniser name or file; the first leads the tables",
    )
    lpips_backbone: str | None = Field(None, description="torchvision's alexnet file; none: torch hub's cache")
    batch_size: int = Field(16, ge=1, description="restored photos at a time; changes no number")
    device: Device = Field("auto", description="where people are learned and photos restored; scoring stays on the CPU")
    progress: bool = True

    @model_validator(mode="after")
    def _split_in_a_file(self) -> MeasureConfig:
        if self.split_file is None and self.split != type(self).model_fields["split"].default:
            raise ValueError("split: of no effect without split_file, which says who belongs to it")
        return self

    def files(self) -> list[str | None]:
        """What is read beside photos and the model."""
        return [self.split_file, self.lpips_backbone, *self.recognisers.values()]


def held_out(config: MeasureConfig, strict: bool) -> People:
    """Everybody in the config's split. strict: see `identities.split`.

    Raises DataError for people or photos that the training saw, if the config says whom it saw.
    """
    people = identities.load_people(config.data, layout=config.layout)
    trained = identities.load_people(*config.trained_on, layout=config.layout) if config.trained_on else None
    if config.split_file:
        parts = identities.split(people, file=config.split_file, strict=strict)
        if config.split not in parts:
            raise ConfigError(f"{config.split_file}: no split '{config.split}'; it has {', '.join(sorted(parts))}")
        people = parts[config.split]
        trained = trained and trained_people(trained, config.split_file, config.trained_parts)
    if trained:
        assert_disjoint(people, trained)
    return people


def trained_people(people: People, split_file: str, trained_parts: Iterable[str]) -> People:
    """Those of `people` whom the training saw; ConfigError for a part of the split file that none of them is in."""
    parts = identities.split(people, file=split_file, strict=False)
    for part in trained_parts:
        if part not in parts:
            raise ConfigError(f"{split_file}: trained_on has nobody in its split '{part}'")
    return people.select(name for part in trained_parts for name in parts[part])


def assert_disjoint(measured: People, trained: People) -> None:
    """Raises DataError when a person (by set and name) or a photo (by SHA-256) is in both."""

    def names(people: People) -> set[str]:
        return {f"{people.set_name}/{name}" if people.set_name else name for name in people}

    if both := sorted(names(measured) & names(trained)):
        raise DataError(f"'{both[0]}' (of {len(both)}) is measured and was in training; leave them out of one")
    seen = {photo.sha256: photo.path for photo in trained.photos()}
    for photo in measured.photos():
        if photo.sha256 in seen:
            raise DataError(f"{photo.path}: the same photo was in training as {seen[photo.sha256]}; remove one")
