"""The identity-conditioned start: from who the person is to where the latent adapter begins.

A small hypernetwork maps the mean recogniser embedding of a person's photos to one W+ offset per decoder layer. It is
trained together with the base, the identity left out part of the time, so it makes zero gradient steps personal.
Beside it a gate reads from the input's own latent how much the input leaves open: a photo that shows who it is needs
no help, and would only be pulled away from the truth.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IdentityStart(nn.Module):
    """Identity [P, embedding_dim] (unit norm) -> W+ offsets [P, n_latent, style_dim]."""

    def __init__(self, embedding_dim: int = 256, n_latent: int = 12, style_dim: int = 512, hidden: int = 256):
        super().__init__()
        self.embedding_dim, self.n_latent, self.style_dim, self.hidden = embedding_dim, n_latent, style_dim, hidden
        self.body = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.LeakyReLU(0.2))
        self.head = nn.Linear(hidden, n_latent * style_dim)
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(hidden))
        nn.init.zeros_(self.head.bias)
        self.gate = nn.Linear(style_dim, n_latent)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 2.0)

    def openness(self, w: Tensor) -> Tensor:
        """The input's w [B, style_dim] -> share of a personal offset to apply per decoder layer, [B, n_latent]."""
        return torch.sigmoid(self.gate(w))

    def forward(self, identity: Tensor) -> Tensor:
        # unit vectors have components of about 1/sqrt(dim); bring them to unit variance
        hidden = self.body(identity * math.sqrt(self.embedding_dim))
        return self.head(hidden).reshape(-1, self.n_latent, self.style_dim)

    def config(self) -> dict:
        return {"embedding_dim": self.embedding_dim, "n_latent": self.n_latent, "style_dim": self.style_dim,
                "hidden": self.hidden}

    def grow(self) -> "IdentityStart":
        """The start of a model of twice the size: two more latents, which begin as the last one's copies."""
        grown = IdentityStart(self.embedding_dim, self.n_latent + 2, self.style_dim, self.hidden)
        with torch.no_grad():
            grown.body.load_state_dict(self.body.state_dict())
            for name, mine in grown.state_dict().items():
                if name.startswith(("head.", "gate.")):
                    layers = self.state_dict()[name].unflatten(0, (self.n_latent, -1))
                    mine.copy_(torch.cat((layers, layers[-1:], layers[-1:])).flatten(0, 1))
        return grown


def mean_identity(embeddings: Tensor, dim: int = 0) -> Tensor:
    """The unit-norm mean direction of unit embeddings [..., K, ..., D] over `dim`."""
    return F.normalize(embeddings.mean(dim=dim), dim=-1)
