"""The critics of `metagpen train`: networks that tell restored faces from true ones, taught beside the restorer.

Each says how much of the restorer's loss is its own (`terms`) and how wrong it was itself (`losses`), and learns from
that. One looks at the whole face (GPEN's, Yang et al. 2021), one at eyes, nose and mouth (GFPGAN's, Wang et al. 2021),
one through a frozen network (Sauer et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .gpen.discriminator import Discriminator, FaceRegionDiscriminator
from .losses import ProjectedCritic, discriminator_loss, feature_matching, generator_loss, r1_penalty
from .tensors import shapes


class Seen(NamedTuple):
    """What the projected critic judges: brightness [B, 1, S, S] and maps [B, C, h, w] of restored and true faces."""

    restored: Tensor
    truth: Tensor
    maps: list[Tensor]
    true_maps: list[Tensor]


class Shown(NamedTuple):
    """Restored and true faces [B, 3, S, S], landmarks [B, 5, 2] in their pixels; `seen` by a frozen network, if any."""

    restored: Tensor
    truth: Tensor
    landmarks: Tensor
    seen: Seen | None


class Critic:
    """A network, and what teaches it. r1: weight of its gradient penalty, taken every `r1_every` steps for as many.

    steady: whether all of its steps are the same work, so that they can be recorded.
    """

    steady = False

    def __init__(self, network: nn.Module, lr: float, beta1: float, r1: float = 0.0, r1_every: int = 1):
        self.network, self.r1, self.r1_every = network, r1, r1_every
        self.optimiser = torch.optim.Adam(network.parameters(), lr=lr, betas=(beta1, 0.99))

    def terms(self, shown: Shown, weight: Any) -> dict[str, Tensor]:
        """Of the restorer's loss, weighted; weight: the stage's `LossWeights`."""
        raise NotImplementedError

    def losses(self, shown: Shown, step: int) -> dict[str, Tensor]:
        """Its own; their mean is what it learns from."""
        raise NotImplementedError

    def learn(self, losses: Mapping[str, Tensor]) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).mean().backward()
        self.optimiser.step()

    def penalty(self, judge: Callable[[Tensor], Tensor], truth: Tensor, step: int) -> Tensor | float:
        """R1 at half of the true pictures, if it is this step's turn."""
        if step % self.r1_every:
            return 0.0
        half = max(2, len(truth) // 2)
        return self.r1 / 2 * self.r1_every * r1_penalty(judge, truth[:half])

    @contextmanager
    def judging(self) -> Iterator[nn.Module]:
        """The network, which learns nothing meanwhile."""
        self.network.requires_grad_(False)
        yield self.network
        self.network.requires_grad_(True)

    def inherit(self, older: Critic) -> None:
        """Go on from what an older critic of its kind knew, of the same or a smaller size."""
        self.network.load_state_dict(older.network.state_dict())


class WholeFace(Critic):
    """GPEN's: a `Discriminator` of the restorer's size, with feature matching on its maps."""

    def terms(self, shown: Shown, weight: Any) -> dict[str, Tensor]:
        with self.judging() as critic:
            maps = critic.features(shown.restored)
            terms = {"adversarial": weight.adversarial * mean_generator_loss([critic.head(maps[-1])])}
            if weight.feature_matching:
                with torch.no_grad():
                    real_maps = critic.features(shown.truth)
                terms["feature_matching"] = weight.feature_matching * feature_matching(maps, real_maps)
        return terms

    def losses(self, shown: Shown, step: int) -> dict[str, Tensor]:
        loss = discriminator_loss(self.network(shown.truth).float(), self.network(shown.restored.detach()).float())
        return {"critic": loss + self.penalty(self.network, shown.truth, step)}

    def inherit(self, older: Critic) -> None:
        inherit_levels(self.network, older.network)


class Regions(Critic):
    """One for each kind of region. R1 is taken at the crops: cutting them out has no second derivative."""

    def terms(self, shown: Shown, weight: Any) -> dict[str, Tensor]:
        with self.judging() as critic:
            return {"regions": weight.regions * mean_generator_loss(critic(shown.restored, shown.landmarks).values())}

    def losses(self, shown: Shown, step: int) -> dict[str, Tensor]:
        critic = self.network
        true_crops, crops = (critic.crops(images, shown.landmarks) for images in (shown.truth, shown.restored.detach()))
        real, fake = critic.judge(true_crops), critic.judge(crops)

        def penalty(name: str) -> Tensor | float:
            return self.penalty(lambda crop: critic.judge({name: crop})[name], true_crops[name], step)

        return {f"critic_{name}": discriminator_loss(real[name].float(), fake[name].float()) + penalty(name)
                for name in real}

    def inherit(self, older: Critic) -> None:
        for kind, own in self.network.kinds.items():
            inherit_levels(own, older.network.kinds[kind])


class Projected(Critic):
    """Small heads on what a frozen network saw, spectrally normalised in place of a penalty."""

    steady = True

    def terms(self, shown: Shown, weight: Any) -> dict[str, Tensor]:
        with self.judging() as critic:
            return {"projected": weight.projected * mean_generator_loss(critic(shown.seen.restored, shown.seen.maps))}

    def losses(self, shown: Shown, step: int) -> dict[str, Tensor]:
        seen = shown.seen
        real = self.network(seen.truth, seen.true_maps)
        fake = self.network(seen.restored.detach(), [m.detach() for m in seen.maps])
        return {f"critic_depth_{k}": discriminator_loss(a.float(), b.float())
                for k, (a, b) in enumerate(zip(real, fake, strict=True))}

    def inherit(self, older: Critic) -> None:
        if shapes(self.network.state_dict()) == shapes(older.network.state_dict()):  # or it looks through another one
            super().inherit(older)


def critics_of(stage: Any, channel_multiplier: float, narrow: float, depths: Callable[[], list[int]],
               device: torch.device) -> dict[str, Critic]:
    """Those that a stage of training asks for, by name. depths: channels of the maps that the projected one sees."""
    loss, found = stage.loss, {}
    penalty = {"beta1": stage.beta1, "r1": stage.r1, "r1_every": stage.r1_every}
    if loss.adversarial or loss.feature_matching:
        network = Discriminator(stage.size, channel_multiplier, narrow).to(device)
        found["critic"] = WholeFace(network, stage.lr_d, **penalty)
    if loss.projected:
        found["projected"] = Projected(ProjectedCritic(depths()).to(device), stage.lr_d, beta1=0.5)
    if loss.regions:
        network = FaceRegionDiscriminator(stage.size, channel_multiplier, narrow).to(device)
        found["regions"] = Regions(network, stage.lr_d, **penalty)
    return found


def mean_generator_loss(logits: Iterable[Tensor]) -> Tensor:
    """Of critics that each say something: every one counts the same."""
    return torch.stack([generator_loss(x.float()).mean() for x in logits]).mean()


def inherit_levels(critic: Discriminator, older: Discriminator) -> None:
    """Copy an older, equal or smaller discriminator's weights into the layers that serve the same resolution."""
    extra = len(critic.convs) - len(older.convs)
    with torch.no_grad():
        for name, value in older.state_dict().items():
            parts = name.split(".")
            if parts[0] == "convs":
                index = int(parts[1])
                if index == 0 and extra:
                    continue  # the layer that reads RGB belongs to its own resolution
                name = ".".join(["convs", str(index + extra), *parts[2:]])
            critic.state_dict()[name].copy_(value)
