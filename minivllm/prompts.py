"""What a prompt may be: text, token ids, or one of vLLM's dicts."""

from collections.abc import Mapping, Sequence

from minivllm.errors import RequestError, short

Prompt = str | Sequence[int] | Mapping[str, object]


def open_dict(prompt: Mapping[str, object], where: str) -> tuple[object, str]:
    """vLLM's dict prompts: the text or the token ids, and the namespace for the prefix cache."""
    salt = prompt.get("cache_salt") or ""
    if not isinstance(salt, str) or not is_unicode(salt):
        raise RequestError(f"{where}: cache_salt must be a string of whole characters, not {short(salt)}")
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key], salt
    raise RequestError(f"{where}: the dict needs 'prompt' or 'prompt_token_ids', it has {sorted(map(str, prompt))}")


def require_unicode(text: str, where: str) -> None:
    """Refuse what no tokenizer and no hash can encode."""
    if not is_unicode(text):
        raise RequestError(f"{where}: the text holds half a surrogate pair, which is no character; remove it")


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
