"""How this room puts other people's exceptions into one line."""


def one_line(error: Exception) -> str:
    """The exception's type and message, without line breaks."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
