"""The errors a user may meet: one sentence each, saying what, where, and what to do instead."""


class MiniVLLMError(Exception):
    """Base of every error that is the user's to mend; its text is one line."""


class ModelError(MiniVLLMError, ValueError):
    """A model that is unknown, unsupported, incomplete or out of reach."""


class ConfigError(MiniVLLMError, ValueError):
    """An engine or sampling option outside its range."""


class RequestError(MiniVLLMError, ValueError):
    """A request the engine refuses at the door: empty, too long, or it could never fit."""


def short(value: object) -> str:
    """What was given, on one line of bounded length."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length():,} bits"  # Python itself refuses to print the longest
    text = " ".join(repr(value).split())  # arrays print on several lines
    return text if len(text) <= 60 else text[:57] + "..."
