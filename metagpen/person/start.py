"""The identity-conditioned start: from who the person is to where the latent adapter begins.

A small hypernetwork maps the mean recogniser embedding of a person's photos to one W+ offset per decoder layer. It is
trained together with the base, the identity left out part of the time, so it makes zero gradient steps personal. An
outer loop can teach it to guess the decoder's mixtures too.
Beside it a gate sees from the degraded photo how much it leaves open: a photo that shows who it is needs no help,
and would only be pulled away from the truth.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Parameters


class Gate(nn.Module):
    """Degraded faces [B, 3, S, S] in [-1, 1] -> the share of a person that each decoder layer lets in, [B, n_latent],
    and what is added to w whoever they show, `filling` [B, n_latent, style_dim].

    share_l = sigmoid(slope_l · (severity - centre_l)), where `severity` estimates how much of the identity the
    degradation took away. It looks at the picture and not at the latent w, which hardly says how damaged a photo is.

    What it lets in is `nobody` [n_latent, style_dim], the offset of a person unknown, and on top of it what sets a
    known one apart from nobody. Without it a ruined photo of a stranger keeps its blocks and its noise: they come in
    through the encoder's features, and only a large change of the styles keeps them out.

    Whoever it shows, a photo's damage also calls for styles of its own, `answer`: how much of the fine features to
    believe. It is what degradation-aware modulation is in blind super-resolution (Wang et al. 2021, DASR), and spares
    the encoder's w from having to carry a noise level through the whole network.
    """

    def __init__(self, n_latent: int, style_dim: int = 512, bands: int = 4, hidden: int = 64):
        super().__init__()
        self.bands = bands
        self.judge = nn.Sequential(nn.Linear(2 * 3 * bands, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden),
                                   nn.LeakyReLU(0.2), nn.Linear(hidden, 1))
        nn.init.constant_(self.judge[-1].bias, 1.0)  # until it has learned, everything counts as ruined: open
        self.slope = nn.Parameter(torch.full((n_latent,), 7.0))
        self.centre = nn.Parameter(torch.full((n_latent,), 0.5))
        self.nobody = nn.Parameter(torch.zeros(n_latent, style_dim))
        self.answer = nn.Sequential(nn.Linear(2 * 3 * bands, hidden), nn.LeakyReLU(0.2),
                                    nn.Linear(hidden, n_latent * style_dim))
        nn.init.zeros_(self.answer[-1].weight)
        nn.init.zeros_(self.answer[-1].bias)

    def severity(self, images: Tensor) -> Tensor:
        """Estimate of 1 - cosine(degraded, true face) for a recogniser: [B], about 0 for a clear photo, 1 for ruins."""
        return self.judge(band_statistics(images, self.bands)).squeeze(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        statistics = band_statistics(images, self.bands)
        severity = self.judge(statistics).detach()  # an estimate of a fact; what follows from it is slope and centre
        share = torch.sigmoid(self.slope * (severity - self.centre))
        answer = self.answer(statistics).unflatten(1, self.nobody.shape)
        return share, share[:, :, None] * self.nobody + answer


def band_statistics(images: Tensor, bands: int) -> Tensor:
    """Images [B, 3, S, S] -> [B, 6 · bands]: how strong and how sparse each band of a Laplacian pyramid is, by channel.

    Blur empties the fine bands, noise fills them evenly and blocks fill them sparsely. Logarithms, brought to order 1:
    of the root mean square, and of its ratio to the mean magnitude. S must be a multiple of 2^bands.
    """
    found = []
    for _ in range(bands):
        smaller = F.avg_pool2d(images, 2)
        band = images - F.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False)
        strength = (band.square().mean(dim=(2, 3)) + 1e-6).log() / 2
        sparsity = strength - (band.abs().mean(dim=(2, 3)) + 1e-4).log()
        found += [strength / 2 + 2, 2 * sparsity]
        images = smaller
    return torch.cat(found, dim=1)


class MixtureHead(nn.Module):
    """Features of an identity [P, hidden] -> how much of each of the `rank` shared filters every channel of every
    decoder layer takes, `decoder.{k}.up` [P, channels[k], rank]. It begins at zero.

    A network that guesses low-rank weight differences from a face is HyperDreamBooth's (Ruiz et al. 2023); here they
    are mixtures of filters that all people share, few enough for one linear layer behind a bottleneck of `width`.
    """

    def __init__(self, hidden: int, channels: Sequence[int], rank: int, width: int):
        super().__init__()
        self.channels, self.rank, self.width = list(channels), rank, width
        self.narrow = nn.Linear(hidden, width)
        self.head = nn.Linear(width, sum(channels) * rank)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Parameters:
        mixtures = self.head(self.narrow(features)).unflatten(1, (-1, self.rank)).split(self.channels, dim=1)
        return {f"decoder.{k}.up": own for k, own in enumerate(mixtures)}

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "rank": self.rank, "width": self.width}


class IdentityStart(nn.Module):
    """Identity [P, embedding_dim] (unit norm) -> W+ offsets from nobody [P, n_latent, style_dim].

    mixtures: the arguments of a `MixtureHead` but its first, or None: whether it guesses those too (`guess`).
    appearance: whether it also looks at the mean w that the encoder has for the person's photos. It can show hair, skin
    and age, which an embedding made to tell people apart in any light, and at any age, is trained to overlook.
    """

    def __init__(self, embedding_dim: int = 256, n_latent: int = 12, style_dim: int = 512, hidden: int = 256,
                 mixtures: dict[str, Any] | None = None, appearance: bool = False):
        super().__init__()
        self.embedding_dim, self.n_latent, self.style_dim, self.hidden = embedding_dim, n_latent, style_dim, hidden
        self.body = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.LeakyReLU(0.2))
        self.head = nn.Linear(hidden, n_latent * style_dim)
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(hidden))
        nn.init.zeros_(self.head.bias)
        self.gate = Gate(n_latent, style_dim)
        self.mixtures = None if mixtures is None else MixtureHead(hidden, **mixtures)
        self.appearance: nn.Linear | None = None
        if appearance:
            self.look_at_appearance()

    def look_at_appearance(self) -> None:
        """From now on it looks at the mean w too, which says nothing until that is learned."""
        self.appearance = nn.Linear(self.style_dim, self.hidden, bias=False)
        nn.init.zeros_(self.appearance.weight)

    def features(self, identity: Tensor, appearance: Tensor | None = None) -> Tensor:
        linear, activation = self.body
        # unit vectors have components of about 1/sqrt(dim); bring them to unit variance
        seen = linear(identity * math.sqrt(self.embedding_dim))
        if self.appearance is not None and appearance is not None:
            seen = seen + self.appearance(appearance)
        return activation(seen)

    def forward(self, identity: Tensor) -> Tensor:
        return self.offsets(self.features(identity))

    def offsets(self, features: Tensor) -> Tensor:
        return self.head(features).unflatten(1, (self.n_latent, self.style_dim))

    def guess(self, identity: Tensor, appearance: Tensor | None = None) -> Parameters:
        """All that it says about the parameters of these people, of mean w `appearance` [P, style_dim] if it looks at
        that: the offsets, and the mixtures if it has a head."""
        features = self.features(identity, appearance)
        return {"latent.offset": self.offsets(features), **(self.mixtures(features) if self.mixtures else {})}

    def config(self) -> dict[str, Any]:
        """What rebuilds it; its additions only where it has them, so that files without stay as they were."""
        shape = {"embedding_dim": self.embedding_dim, "n_latent": self.n_latent, "style_dim": self.style_dim,
                 "hidden": self.hidden}
        if self.mixtures is not None:
            shape["mixtures"] = self.mixtures.config()
        return shape if self.appearance is None else {**shape, "appearance": True}

    def grow(self) -> "IdentityStart":
        """The start of a model of twice the size: two more latents, which begin as the last one's copies. It guesses
        no mixtures, whose filters stay behind with the smaller model."""
        grown = IdentityStart(self.embedding_dim, self.n_latent + 2, self.style_dim, self.hidden,
                              appearance=self.appearance is not None)
        with torch.no_grad():
            for name, mine in grown.state_dict().items():
                value = self.state_dict()[name]
                if name.startswith(("head.", "gate.slope", "gate.centre", "gate.nobody", "gate.answer.2.")):
                    layers = value.unflatten(0, (self.n_latent, -1))
                    value = torch.cat((layers, layers[-1:], layers[-1:])).flatten(0, 1)
                mine.copy_(value)
        return grown


def mean_identity(embeddings: Tensor, dim: int = 0) -> Tensor:
    """The unit-norm mean direction of unit embeddings [..., K, ..., D] over `dim`."""
    return F.normalize(embeddings.mean(dim=dim), dim=-1)
