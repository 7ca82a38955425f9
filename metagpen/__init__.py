"""metagpen: teach a face-restoration network one person's face from a few photos."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. They load on first use: `import metagpen` itself imports no heavy library.
_EXPORTS = {
    "load": "weights",
    "MetaGPEN": "model",
    "Person": "person",
    "PersonStore": "person",
    "restore_many": "person",
    "restore_photo": "restore",
    "AdaptConfig": "adaptation",
    "adapt": "adaptation",
    "adapt_many": "adaptation",
    "check_album": "check",
    "shots_curve": "evaluate.curve",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .adaptation import AdaptConfig as AdaptConfig
    from .adaptation import adapt as adapt
    from .adaptation import adapt_many as adapt_many
    from .check import check_album as check_album
    from .evaluate.curve import shots_curve as shots_curve
    from .model import MetaGPEN as MetaGPEN
    from .person import Person as Person
    from .person import PersonStore as PersonStore
    from .person import restore_many as restore_many
    from .restore import restore_photo as restore_photo
    from .weights import load as load


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'metagpen' has no attribute '{name}'")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
