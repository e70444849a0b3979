"""The exceptions that are told to the user in one line."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a folder, a model name.

    Its message is one line that says what is wrong and what to do about it. Every job prints it as it is
    (no traceback) and exits with code 2.
    """


class BadSettings(InputError):
    """Settings with which the work fails however often it is tried: no network can be built, or training diverges."""


class Outage(InputError):
    """Something did not answer for as long as it was waited for, or is held by others: the same input may do later."""


class JobFailed(RuntimeError):
    """A job that ran elsewhere failed; its output has been shown.

    Attributes:
        code: what to exit with, between 1 and 255.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(RuntimeError):
    """A signal ended the job before its work was done; what is done is kept.

    Attributes:
        code: the job's exit code, 128 + the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number
