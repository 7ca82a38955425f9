"""What training and adaptation minimise: pixel, perceptual, identity and adversarial terms."""

from .adversarial import discriminator_loss, feature_matching, generator_loss, r1_penalty
from .perceptual import RecogniserLoss, RecogniserTerms
from .pixel import chroma_l1, gradient_l1, l1, luma
from .projected import ProjectedCritic
from .vgg import VGGLoss, VGGTerms

__all__ = ["ProjectedCritic", "RecogniserLoss", "RecogniserTerms", "VGGLoss", "VGGTerms", "chroma_l1",
           "discriminator_loss", "feature_matching", "generator_loss", "gradient_l1", "l1", "luma", "r1_penalty"]
