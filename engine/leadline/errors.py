"""The one kind of error that is the user's to mend."""


class LeadlineError(Exception):
    """Bad input, said in one line: what is wrong, where, and what to do.

    The command line prints the line and exits with code 2; anything else that is raised is a defect of Leadline.
    """


class StorageError(LeadlineError):
    """An object store refuses, or does not answer: another try may succeed."""


def one_line(error: BaseException) -> str:
    """What an exception of another library says: its type and message, without line breaks."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
