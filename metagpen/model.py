"""A restorer as it is shipped: GPEN, its identity-conditioned start if it has one, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, PhotoError
from .gpen import GPEN
from .person.adapter import AdapterSpec, LastMixtures, Parameters, personal_forward
from .person.bases import DecoderBases
from .person.rule import InnerRule
from .person.start import Gate, IdentityStart
from .tensors import differences, digest_of, read_tensors, shapes, some, write_tensors

FAMILY = "metagpen-model-"  # what the formats of all versions begin with
FORMAT = f"{FAMILY}4"


class MetaGPEN(nn.Module):
    """`gpen` restores; `start` (or None) turns an identity into the first guess of a person's latent adapter; `rule`
    (or None) is what is known about the steps from there, learned by an outer loop or calibrated; `bases` (or None,
    random ones) are the filters that everybody's differences of the decoder are made of.

    `card`: what a user should know: training data, cost, licence, the recogniser that `start` understands.
    Frozen once loaded: adaptation returns a `Person` and never changes these weights.
    """

    def __init__(self, gpen: GPEN, start: IdentityStart | None = None, card: dict[str, Any] | None = None,
                 rule: InnerRule | None = None, bases: DecoderBases | None = None):
        super().__init__()
        if start is not None and gpen.size % 2**start.gate.bands:
            raise ConfigError(f"size = {gpen.size}: the start's gate looks at pictures of {2**start.gate.bands} px or "
                              "more")
        self.gpen, self.start, self.rule, self.bases, self.card = gpen, start, rule, bases, dict(card or {})
        self._fingerprint: str | None = None
        self._random_bases: dict[tuple[int, torch.device, torch.dtype], DecoderBases] = {}
        self._last_mixtures = LastMixtures()
        self.register_load_state_dict_post_hook(other_weights)

    @property
    def size(self) -> int:
        """Side of the aligned faces this model works on, in pixels."""
        return self.gpen.size

    @property
    def device(self) -> torch.device:
        return self.gpen.ecd0[0][0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it restores in: that of its weights, float32 unless `to` changed it."""
        return self.gpen.ecd0[0][0].weight.dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float32 values: the same for the same weights on any device. Kept, so call
        `weights_changed` after writing to weights by hand."""
        if self._fingerprint is None:
            self._fingerprint = digest_of(self.state_dict())
        return self._fingerprint

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MetaGPEN:
        """What `to`, `half` and the like do. In another precision the model stays the one it was, whose people fit it;
        back in float32 it is the one that its weights say, which may have been rounded."""
        before, after = self.dtype, fn(self.gpen.ecd0[0][0].weight.detach()[:0]).dtype
        if before != after and self.device.type != "meta":
            self.fingerprint  # noqa: B018  (is kept)
            if after == torch.float32:
                self._fingerprint = None
        return super()._apply(fn, recurse)

    def weights_changed(self) -> None:
        """Forget what was computed from the weights; the model's own `load_state_dict` does it by itself."""
        self._fingerprint, self._last_mixtures = None, LastMixtures()

    def frozen(self) -> MetaGPEN:
        """Itself, in eval mode and without parameter gradients."""
        return self.eval().requires_grad_(False)

    @property
    def gate(self) -> Gate | None:
        """What sees from a face how much it leaves open; None without a start."""
        return self.start.gate if self.start is not None else None

    def look(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Share of a person [B, n_latent] that these degraded faces [B, 3, S, S] let in, and what the model adds to w
        whoever they show, [B, n_latent, style_dim] (see `person.start.Gate`). None, None without a start: everything,
        and nothing."""
        return (None, None) if self.gate is None else self.gate(images)

    def guess(self, identities: Tensor, appearances: Tensor | None = None) -> Parameters | None:
        """Where people of these mean embeddings [P, E] and, if the start looks at them, mean w [P, D] of their photos
        begin, leading dimension P; None without a start. Mixtures only where the model has filters of its own: they say
        nothing about others."""
        if self.start is None:
            return None
        guess = self.start.guess(identities, appearances)
        return guess if self.bases is not None else {"latent.offset": guess["latent.offset"]}

    def appearance(self, images: Tensor) -> Tensor | None:
        """w [B, D] of a person's own aligned photos [B, 3, S, S]; None where no start looks at it."""
        if self.start is None or self.start.appearance is None:
            return None
        return self.gpen.encode(images.to(memory_format=torch.channels_last))[1]

    def bases_of(self, rank: int) -> list[Tensor] | None:
        """The shared filters [rank, in, 3, 3] of each styled convolution; None for rank 0.

        Raises ConfigError where the model's own are fewer."""
        if not rank:
            return None
        if self.bases is not None:
            return self.bases.of(rank)
        key = rank, self.device, self.dtype
        if key not in self._random_bases:
            with torch.inference_mode(False):  # kept for those who learn, too
                self._random_bases[key] = DecoderBases.random(self.gpen, rank)
        return self._random_bases[key].of(rank)

    def check_faces(self, images: Tensor) -> None:
        """Raises PhotoError unless these are floats [B, 3, S, S]."""
        if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != (3, self.size, self.size):
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise PhotoError(f"this model restores aligned faces [B, 3, {self.size}, {self.size}], not {shape}")
        if not images.is_floating_point():
            raise PhotoError(f"aligned faces must be floats in [-1, 1], not {images.dtype}")

    def faces(self, images: Tensor) -> Tensor:
        """Aligned faces [B, 3, S, S] in [-1, 1] as the network takes them: where it lies, in its precision, and in the
        layout that is faster on CPUs. Raises PhotoError as `check_faces`."""
        self.check_faces(images)
        return images.to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def restore(self, images: Tensor) -> Tensor:
        """The generic restoration of aligned faces [B, 3, S, S] in [-1, 1]; same shape, clamped to [-1, 1]."""
        images = self.faces(images)
        return self.gpen(images, self.look(images)[1]).clamp(-1, 1).to(self.dtype)  # whatever autocast made of it

    @torch.no_grad()
    def restore_people(self, images: Tensor, parameters: Parameters, spec: AdapterSpec,
                       strength: float | Tensor = 1.0) -> Tensor:
        """`restore` with the parameters [P, ...] of people, wherever these lie and in whatever precision: images
        person-major [P·B, 3, S, S] -> same shape, clamped to [-1, 1]. spec, strength: see `personal_forward`."""
        images = self.faces(images)
        if not len(images):
            return images
        (share, filling), bases = self.look(images), self.bases_of(spec.decoder_rank)
        mixed_weights = None
        one_person = len(parameters["latent.offset"]) == 1 and not isinstance(strength, Tensor) and strength != 0
        if bases and one_person and not spec.gated_decoder:  # a gate gives every image another part of the mixtures
            ups = [parameters[f"decoder.{k}.up"] for k in range(len(bases))]
            mixed_weights = self._last_mixtures(self.gpen, bases, ups, strength)
        parameters = {name: value.to(images) for name, value in parameters.items()}
        return personal_forward(self.gpen, images, parameters, spec, strength, share=share, filling=filling,
                                bases=bases, mixed_weights=mixed_weights).clamp(-1, 1).to(self.dtype)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write one safetensors file: tensors, the arguments that shape them, and the card.

        float16, the default, rounds: the model that the file holds has another fingerprint, and Persons learned on this
        one do not fit it. Learn people on the model as it was loaded, or save as torch.float32. Raises CheckpointError,
        and writes nothing, where a number is none or too large for `dtype`.
        """
        tensors = {k: v.detach().cpu().to(dtype) for k, v in self.state_dict().items()}
        if broken := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
            raise CheckpointError(f"{path}: not written, because {some(broken)} would hold numbers that are not "
                                  "finite; save with dtype=torch.float32, or go back to a model that is sound")
        header = {"format": FORMAT, "gpen": json.dumps(self.gpen.config.to_dict()),
                  "start": json.dumps(self.start.config() if self.start else None),
                  "rule": json.dumps(self.rule.to_dict() if self.rule else None),
                  "bases": json.dumps(self.bases.rank if self.bases else None), "card": json.dumps(self.card)}
        return write_tensors(path, tensors, header)

    @classmethod
    def from_file(cls, path: str | Path) -> MetaGPEN:
        """Read what `save` wrote, as float32. Raises CheckpointError for anything else."""
        stored, header = read_tensors(path)
        found = header.get("format", "")
        if found != FORMAT:
            what, cure = "a safetensors file, but not a metagpen model", ""
            if found.startswith(FAMILY):
                what, cure = "a metagpen model of another version", "; read it with the metagpen that wrote it"
            raise CheckpointError(f"{path}: {what} (format {found!r}, expected {FORMAT!r}){cure}")
        try:
            return cls._built(header, {name: value.float() for name, value in stored.items()})
        except Exception as error:  # a header written by hand can say anything
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: a damaged metagpen model ({reason}); copy or download it again") from error

    @classmethod
    @torch.random.fork_rng(devices=[])  # what the file fills, the caller's dice need not
    def _built(cls, header: dict[str, str], tensors: dict[str, Tensor]) -> MetaGPEN:
        """The model that a header describes, holding these tensors; nothing is built that they would not fill."""
        arguments, start, card = (json.loads(header[name]) for name in ("gpen", "start", "card"))
        rule, rank = (json.loads(header.get(name, "null")) for name in ("rule", "bases"))
        with torch.device("meta"):
            gpen = GPEN(**arguments)
            empty = cls(gpen, IdentityStart(**start) if start else None,
                        bases=DecoderBases(gpen, rank) if rank else None)
        plain = {name: value for name, value in tensors.items() if not (rule and name.startswith("rule."))}
        if problems := differences(plain, shapes(empty.state_dict())):
            raise CheckpointError(f"it has {problems}")
        gpen = GPEN(**arguments)
        model = cls(gpen, IdentityStart(**start) if start else None, card,
                    InnerRule.from_dict(gpen, rule) if rule else None, DecoderBases(gpen, rank) if rank else None)
        model.load_state_dict(tensors)
        return model


def other_weights(model: MetaGPEN, _: Any) -> None:
    """After `load_state_dict`. A function by name, so that a model can be pickled."""
    model.weights_changed()
