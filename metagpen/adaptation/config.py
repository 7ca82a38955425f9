"""How a person is learned: the settings of the inner loop."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..config import Config, Seed
from ..errors import ConfigError
from ..model import MetaGPEN
from ..person import AdapterSpec

DECIDED_BY_RULE = {"optimiser", "lr_latent", "lr_tail", "lr_decoder", "warmup", "eta_min", "tail_blocks", "tail_rank",
                   "latent_rank", "decoder_rank"}
"""Settings in whose place a model's rule stands."""


class AdaptConfig(Config):
    """How a person is learned. Rates are per kind of tensor; the defaults were checked on four training people only.

    `degradation`: parts of the mixture that fresh degradations are drawn from, as in `degrade.by_name("mixed", ...)`.
    """

    steps: int = Field(32, ge=0)
    batch_size: int = Field(4, gt=0, description="degraded photos per person and step")
    optimiser: str = Field("adam", pattern="^(adam|sgd)$")
    lr_latent: float = Field(1e-2, ge=0)
    lr_tail: float = Field(1e-3, ge=0)
    lr_decoder: float = Field(5e-3, ge=0)
    lr_scale: float = Field(1.0, gt=0, description="on all rates, the rule's too: more where the photos are of the "
                                                   "same sitting as what is to be restored")
    warmup: int = Field(4, ge=0)
    eta_min: float = Field(0.05, ge=0, le=1, description="last rate as a fraction of the first")
    l1: float = Field(2.0, ge=0)
    gradient: float = Field(0.0, ge=0)
    chroma: float = Field(1.0, ge=0)
    perceptual: float = Field(0.5, ge=0)
    identity: float = Field(0.6, ge=0)
    latent_norm: float = Field(1e-3, ge=0)
    flip: bool = True
    degradation: dict[str, Any] = {"heavy": {"face_px": [8, 32], "weight": 0.7}, "gfpgan": 0.15, "bsrgan": 0.15}
    tail_blocks: int = Field(2, ge=0)
    tail_rank: int = Field(8, ge=0)
    latent_rank: int = Field(0, ge=0)
    decoder_rank: int = Field(16, ge=0, description="shared filters that each decoder layer's difference is made of")
    gated_decoder: bool = Field(False, description="whether the gate decides about the decoder's mixtures, too; "
                                                   "without it they count fully, on photos that show who it is as well")
    start: bool = True
    rule: bool = Field(True, description="follow the model's rule, if it has one, in place of the "
                                         "optimiser, rates, spec and initial values given here")
    seed: Seed = 0
    bf16: bool = Field(True, description="autocast to bfloat16 where the processor has it")
    cuda_graphs: bool | None = Field(None, description="on a GPU, record a step and play it again; default: wherever "
                                                       "that can be done")
    compile: bool = Field(False, description="on a CPU, fuse a step's passes over maps with torch.compile, in batches "
                                             "of full size: a C++ compiler's work of a minute or two, once")
    people_per_batch: int = Field(0, ge=0, description="how many learn at a time; 0: as memory allows, at most 8 on a "
                                                       "CPU and 64 on a GPU")
    adversarial_steps: int = Field(0, ge=0, description="stage 2: steps with the critic's last layers released")
    adversarial: float = Field(0.02, ge=0)
    lr_critic: float = Field(1e-3, ge=0)

    def check_rule(self, model: MetaGPEN) -> None:
        """Raises ConfigError for settings that were given although the model's rule decides them."""
        idle = sorted(DECIDED_BY_RULE & self.model_fields_set)
        if self.rule and model.rule is not None and idle:
            raise ConfigError(f"{', '.join(idle)}: of no effect, because the model's rule decides it; give "
                              "rule=False (-s rule=false) beside it, or leave it out")

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.tail_blocks, self.tail_rank, self.latent_rank, decoder_rank=self.decoder_rank,
                           gated_decoder=self.gated_decoder)

    def for_model(self, model: MetaGPEN) -> AdaptConfig:
        """With what the model's rule, if it is to be followed, says in the place of what stands here."""
        if not (self.rule and model.rule is not None):
            return self.model_copy(update={"rule": False})
        said = {**model.rule.spec.to_dict(), "optimiser": model.rule.config.optimiser}
        return self.model_copy(update={name: value for name, value in said.items() if name in DECIDED_BY_RULE})
