"""The network: GPEN's generator and discriminators, state-dict compatible with the published weights."""

from .generator import GPEN, GPENConfig

__all__ = ["GPEN", "GPENConfig"]
