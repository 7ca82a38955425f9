"""What is learned per person: the adapter's parameters, the start that predicts them, and the Person's file."""

from .adapter import AdapterSpec, Parameters, new_parameters, personal_forward
from .person import Person
from .start import IdentityStart, mean_identity

__all__ = ["AdapterSpec", "IdentityStart", "Parameters", "Person", "mean_identity", "new_parameters",
           "personal_forward"]
