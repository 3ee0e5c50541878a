"""One exception tree.

FoveateError
├── ConfigError      a setting is unknown, out of range or of the wrong type
│   └── UnknownNameError   a registry has no such name
├── SourceError      frames cannot be had from where the user pointed
├── ValueShapeError  a value was built with shapes or ranges that contradict each other
├── BudgetError      a token budget cannot be met
├── SignalError      a signal is missing, undeclared or not finite
├── AttachError      a reducer and a model do not fit together
└── SimulatorError   an environment cannot be built, rendered or asked that

Every message says what was given, what is allowed, and what to do.
"""


class FoveateError(Exception):
    """Base of every error that foveate raises on purpose."""


class ConfigError(FoveateError, ValueError):
    """A setting is unknown, out of range or of the wrong type."""


class UnknownNameError(ConfigError):
    """A registry has no such name."""


class SourceError(FoveateError):
    """Frames cannot be had from where the user pointed."""


class ValueShapeError(FoveateError, ValueError):
    """A value was built with shapes or ranges that contradict each other."""


class BudgetError(FoveateError, ValueError):
    """A token budget cannot be met."""


class SignalError(FoveateError):
    """A signal is missing, undeclared or not finite."""


class AttachError(FoveateError):
    """A reducer and a model do not fit together."""


class SimulatorError(FoveateError):
    """An environment cannot be built or rendered here, or cannot do what was asked."""
