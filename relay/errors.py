"""The exceptions and exit codes of the relay. Every message says what, where and the remedy."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of mcrd and mcrctl."""

    OK = 0
    FAILURE = 1  # refused, invalid, or the machine lacks something: the message names it
    USAGE = 2  # a wrong command line; click's own code for it
    UNREACHABLE = 3  # mcrctl found no relay behind the control socket


class RelayError(Exception):
    """Base of all errors that are reported to a user as one line."""

    exit_code = ExitCode.FAILURE


class RuleError(RelayError):
    """A rule that is refused."""


class ConfigError(RelayError):
    """A configuration that is refused: names file, line, key and what is allowed."""


class PreflightError(RelayError):
    """The machine or its privileges do not allow the relay to run."""


class ControlError(RelayError):
    """A request that the relay refused."""


class UsageError(RelayError):
    """A command line that can't be meant, whatever the relay and the machine are like."""

    exit_code = ExitCode.USAGE


class UnreachableError(RelayError):
    """No relay answers on the control socket."""

    exit_code = ExitCode.UNREACHABLE
