"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a folder, a model name.

    Its message is one line that says what is wrong and what to do about it. Every job prints it as it is
    (no traceback) and exits with code 2.
    """
