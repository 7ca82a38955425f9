"""What is learned per person: the adapter's parameters, the start that predicts them, and the Person's file."""

from .adapter import AdapterSpec, Parameters, new_parameters, personal_forward
from .bases import DecoderBases
from .fold import folded
from .person import Person
from .serving import restore_many
from .start import IdentityStart, mean_identity
from .store import PersonStore

__all__ = ["AdapterSpec", "DecoderBases", "IdentityStart", "Parameters", "Person", "PersonStore", "folded",
           "mean_identity", "new_parameters", "personal_forward", "restore_many"]
