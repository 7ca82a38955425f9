"""What a step minimises."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import degrade, recognise
from ..devices import bf16_autocast
from ..losses import RecogniserLoss, chroma_l1, gradient_l1, l1
from ..model import MetaGPEN
from ..person import Parameters, personal_forward
from ..recognise.align import View
from .config import AdaptConfig


class Objective:
    """What a step minimises: reconstruction, perceptual and identity terms of the support, and staying near the start.

    The latent norm is measured from `origin`, where the person started (in stage 2, where stage 1 ended), so that it
    never pulls a face back to nobody.
    """

    def __init__(self, model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None,
                 origin: Tensor | None):
        self.model, self.config, self.spec, self.origin = model, config, config.spec, origin
        self.degradation = degrade.full_size(config.degradation)
        self.recogniser_loss = RecogniserLoss(recogniser) if recogniser else None
        self.autocast = partial(bf16_autocast, model.device, config.bf16)
        self.forward = personal_forward

    def restore(self, parameters: Parameters, poor: Tensor) -> Tensor:
        with self.autocast():
            share, filling = self.model.look(poor)
            return self.forward(self.model.gpen, poor.contiguous(memory_format=torch.channels_last), parameters,
                                self.spec, frozen=True, share=share, filling=filling,
                                bases=self.model.bases_of(self.spec.decoder_rank)).float()

    def terms(self, parameters: Parameters, restored: Tensor, truth: Tensor, poor: Tensor,
              landmarks: Tensor | View) -> Tensor:
        """The loss of each person [P]."""
        config = self.config
        loss = config.l1 * l1(restored, truth)
        if config.gradient:
            loss = loss + config.gradient * gradient_l1(restored, truth)
        if config.chroma:
            loss = loss + config.chroma * chroma_l1(restored, truth)
        if config.perceptual or config.identity:
            with self.autocast():
                seen = self.recogniser_loss(restored, truth, landmarks, poor)
            loss = loss + config.perceptual * seen.perceptual + config.identity * seen.identity
        moved = parameters["latent.offset"] - (0 if self.origin is None else self.origin)
        people = moved.shape[0]
        return loss.unflatten(0, (people, -1)).mean(dim=1) + config.latent_norm * moved.square().mean(dim=(1, 2))

    def __call__(self, parameters: Parameters, truth: Tensor, poor: Tensor, landmarks: Tensor | View) -> Tensor:
        return self.terms(parameters, self.restore(parameters, poor), truth, poor, landmarks)
