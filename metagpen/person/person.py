"""A Person: what was learned about one face, ready to restore with, and its small file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import CheckpointError, ConfigError, DataError
from ..faces import PhotoSource
from ..tensors import differences, pack_tensors, some, unpack_tensors, write_tensors
from .adapter import AdapterSpec, Parameters, new_parameters, parameter_shapes

if TYPE_CHECKING:
    from ..model import MetaGPEN

FORMAT = "metagpen-person-1"
TEMPLATE = "recogniser.template"  # its name in the file, beside the parameters


@dataclass(eq=False, repr=False)  # tensors have no single answer to ==: a Person is equal to itself alone
class Person:
    """One person's adapter on a model that many people share.

    model: the shared `MetaGPEN`, never changed. parameters: see `metagpen.person.adapter`, people dimension 1.
    metadata: shots, steps, seed, recogniser and the like, written into the file. template: the unit mean embedding [E]
    of the person's photos by `metadata["recogniser"]`, by which photos are matched; None in files that have none.
    """

    model: MetaGPEN
    spec: AdapterSpec
    parameters: Parameters
    metadata: dict[str, Any] = field(default_factory=dict)
    template: Tensor | None = None

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.parameters.values())
        return (f"Person({count:,} numbers on a {self.model.size} px model, shots={self.metadata.get('shots')}, "
                f"steps={self.metadata.get('steps')})")

    @classmethod
    def generic(cls, model: MetaGPEN) -> Person:
        """Nobody in particular: restores as the generic model does at any strength."""
        spec = AdapterSpec(tail_blocks=0, tail_rank=1)
        return cls(model, spec, new_parameters(model.gpen, spec, 1, torch.Generator()), {"shots": 0, "steps": 0})

    def restore_batch(self, images: Tensor, strength: float = 1.0) -> Tensor:
        """Aligned faces [B, 3, S, S] in [-1, 1] -> restored, same shape, clamped to [-1, 1].

        strength: 0 is the generic model bit for bit, 1 fully personal. Raises ConfigError outside [0, 1].
        """
        return self.model.restore_people(images, self.parameters, self.spec, must_be_strength(strength))

    def restore(self, source: PhotoSource, strength: float = 1.0, aligned: bool = False, *,
                null_space: bool = False) -> Image.Image:
        """Restore the faces of a photo, the person's own as theirs; with `aligned`, the photo is a face's square crop.

        `metagpen.restore_photo` with this one Person, which says more. source: path, PIL image, array or tensor.
        Returns a picture of the photo's size (an aligned crop: S x S). Raises PhotoError when no face is found:
        some heavily degraded faces are not, and `restore_photo` can be told where they are.
        """
        from ..restore import restore_photo  # the room above this one

        return restore_photo(self.model, source, self, strength=strength, null_space=null_space,
                             aligned=aligned).image

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, fp16, first to a temporary name: a crash leaves what was there before."""
        return write_tensors(person_file(path), *self._content())

    def to_bytes(self, **header: str) -> bytes:
        """What `save` writes, with more lines for the file's header."""
        tensors, own = self._content()
        return pack_tensors(tensors, own | header)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {name: value[0].detach().half().cpu() for name, value in self.parameters.items()}
        if self.template is not None:
            tensors[TEMPLATE] = self.template.detach().half().cpu()
        return tensors, {"format": FORMAT, "model": self.model.fingerprint, "spec": json.dumps(self.spec.to_dict()),
                         "metadata": json.dumps(self.metadata)}

    @classmethod
    def load(cls, path: str | Path, model: MetaGPEN) -> Person:
        """Read a Person for `model`. Raises CheckpointError for a damaged file or one made on another model."""
        if Path(path).is_dir():
            raise CheckpointError(f"{path}: a folder, not a Person file; a store of many is opened with --store, or "
                                  "PersonStore(folder, model)")
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such Person file")
        return cls.from_bytes(Path(path).read_bytes(), model, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, model: MetaGPEN, source: str = "the given bytes") -> Person:
        """Read the content of a Person file; `source` is what errors call it. Raises CheckpointError as `load`."""
        try:
            tensors, header = unpack_tensors(data)
        except Exception as error:  # safetensors raises its own, undocumented error types
            raise CheckpointError(f"{source}: not a readable Person file ({error})") from error
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{source}: a safetensors file, but not a Person (format {header.get('format')!r}, "
                                  f"expected {FORMAT!r})")
        if header.get("model") != model.fingerprint:
            theirs = header.get("model", "")[:12]
            raise CheckpointError(f"{source}: this Person was learned on another model (its fingerprint begins "
                                  f"{theirs}, this one's {model.fingerprint[:12]}); load that model, or adapt again "
                                  "from the photos")
        template = tensors.pop(TEMPLATE, None)
        try:
            spec, metadata = AdapterSpec(**json.loads(header["spec"])), json.loads(header["metadata"])
            reason = misfit(tensors, model, spec)
            if not isinstance(metadata, dict):
                reason = "its metadata is no mapping"
            elif template is not None and (template.ndim != 1 or not bool(template.isfinite().all())):
                reason = "its template is no vector of finite numbers"
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = f"its header is not a Person's: {error}"
        if reason:
            raise CheckpointError(f"{source}: a damaged Person file ({reason}); copy it again, or adapt again from the "
                                  "photos")
        parameters = {name: value.float()[None].to(model.device) for name, value in tensors.items()}
        return cls(model, spec, parameters, metadata, None if template is None else template.float())

    def compress(self, tail_rank: int | None = None, latent_rank: int | None = None,
                 max_bytes: int | None = None) -> Person:
        """A smaller Person of lower rank, the nearest one in every tensor (see `metagpen.person.compress`)."""
        from .compress import compress

        return compress(self, tail_rank, latent_rank, max_bytes)


def must_be_strength(value: Any) -> float:
    """The strength as a float, whatever number it came as (numpy's, a tensor). Raises ConfigError outside [0, 1]."""
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = math.nan
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength must lie in [0, 1], not {value}")
    return strength


def person_file(path: str | Path) -> Path:
    """The file that `Person.save(path)` writes: its name ends in .safetensors. Raises DataError for no name."""
    path = Path(path)
    if not path.name:
        raise DataError(f"{path}: a folder; give the name of the Person file in it")
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def misfit(tensors: dict[str, Tensor], model: MetaGPEN, spec: AdapterSpec) -> str:
    """What keeps the tensors of a file from being a Person's of this spec on this model; "" if nothing does."""
    wanted = parameter_shapes(model.gpen, spec)
    for name in [name for name in wanted if name.endswith(".up") and name in tensors]:
        down = f"{name.removesuffix('.up')}.down"
        if down not in wanted:  # the decoder's factors go with filters that are the model's
            continue
        rank = min(tensors[name].shape[-1:], default=0)  # which may be smaller than the spec's where a side is
        if 0 < rank < wanted[name][-1]:
            wanted[name], wanted[down] = (*wanted[name][:-1], rank), (*wanted[down][:-2], rank, wanted[down][-1])
    if reason := differences(tensors, wanted):
        return reason
    model.bases_of(spec.decoder_rank)  # raises where they are too few
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return f"numbers that are not finite in {some(broken)}" if broken else ""
