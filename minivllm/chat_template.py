"""A conversation becomes a prompt through the model's own chat template."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from minivllm.errors import RequestError
from minivllm.outputs import Tokenizer
from minivllm.prompts import require_unicode
from minivllm.text_engine import Checked


def apply_template(
    tokenizer: Tokenizer, model: str, messages: object, where: str, add_generation_prompt: bool = True
) -> Checked:
    """The prompt that stands for `messages`. Raises RequestError, naming `where`, for anything unusable."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(f"{where}: the model {model} has no chat template; use generate with plain text")
    if not isinstance(messages, Sequence) or not messages or not all(_is_message(m) for m in messages):
        raise RequestError(f"{where}: must be a non-empty list of dicts with the strings 'role' and 'content'")
    try:
        text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]  # checked above
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:  # templates refuse orders of roles they do not know
        raise RequestError(f"{where}: the chat template says: {' '.join(str(error).split())}") from error
    require_unicode(text, where)
    token_ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[call-arg]  # the template has them
    return Checked(text, token_ids)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
