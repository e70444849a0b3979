"""The exceptions that the user sees as one line."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a folder, a model name.

    Its message is one line that says what is wrong and what to do. Every job prints that line without a traceback, and
    exits with code 2.
    """


class BadSettings(InputError):
    """Settings with which every attempt fails: no network can be built, or training diverges."""


class Outage(InputError):
    """A service did not answer in time, or others hold a resource. The same input may work later."""


class JobFailed(RuntimeError):
    """A job that ran elsewhere failed; its output has been shown.

    Attributes:
        code: exit code, from 1 to 255.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(RuntimeError):
    """A signal ended the job before its work was done. The finished part is kept.

    Attributes:
        code: the job's exit code, 128 + the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number
