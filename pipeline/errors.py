"""How a job ends that did not succeed."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a folder, a model name.

    Its message is one line that says what is wrong and what to do about it. Every job prints it as it is
    (no traceback) and exits with code 2.
    """


class JobFailed(RuntimeError):
    """A job that ran elsewhere failed; its output has been shown.

    Attributes:
        code: what to exit with, between 1 and 255.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
