"""Errors that a user can cause and mend. Each message says what was wrong, where, and what to do."""


class MetagpenError(ValueError):
    """Base of every error that metagpen raises on bad input; the command line prints it without a traceback."""


class PhotoError(MetagpenError):
    """A photo cannot be read, or shows no usable face."""


class CheckpointError(MetagpenError):
    """A weights or Person file is damaged, of another layout, or belongs to another model."""


class ConfigError(MetagpenError):
    """A configuration key or value is unknown or impossible."""


class DataError(MetagpenError):
    """A dataset folder, list or split is missing something or contradicts itself."""


class PersonNotFound(DataError, KeyError):
    """A store holds no person of that name."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes
