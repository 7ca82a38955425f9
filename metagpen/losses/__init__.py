"""What training and adaptation minimise: pixel, perceptual, identity and adversarial terms."""

from .adversarial import discriminator_loss, feature_matching, generator_loss, r1_penalty
from .perceptual import RecogniserLoss
from .pixel import gradient_l1, l1

__all__ = ["RecogniserLoss", "discriminator_loss", "feature_matching", "generator_loss", "gradient_l1", "l1",
           "r1_penalty"]
