"""Exceptions that a user may meet.

AnnatacError
├── InputError(ValueError)   a file, table or argument given by the user is not what it should be
├── ConfigError(ValueError)  a configuration key or value is unknown or out of range
├── StoreError               an island store is incomplete, damaged, busy or does not match
├── ModelError               a model folder is damaged or does not fit the store
└── RunInterruptedError      a signal asked a run to end; it kept its state

Every message names the file or option, the place in it, what was found, what was expected and what to do.
The command line prints the message on one line and exits with code 2.
"""


class AnnatacError(Exception):
    """Base of all errors that annatac_scale raises on purpose."""


class InputError(AnnatacError, ValueError):
    """A file, table or argument given by the user is not what it should be."""


class ConfigError(AnnatacError, ValueError):
    """A configuration key is unknown, or its value has the wrong type or range."""


class StoreError(AnnatacError):
    """An island store is incomplete, damaged, busy, or does not match what is asked of it."""


class ModelError(AnnatacError):
    """A model folder is damaged, or does not fit the store it is used on."""


class NoRoomError(StoreError):
    """A disk is full: what is whole is kept, and the same command goes on when there is room."""


class RunInterruptedError(AnnatacError):
    """A signal asked a run to end, and it ended, its state kept: the same command goes on. number: of the signal"""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
