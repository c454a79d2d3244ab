"""Groups of layers in words: which layers a block table serves, as far as a trace's header tells."""

from collections.abc import Mapping

from minivllm.views.pool_state import PoolState
from minivllm.views.theme import counted


def group_words(header: Mapping[str, object], state: PoolState) -> list[str]:
    """Each group of layers in words: "group 1: layers 0, 1, 2; the last 512 tokens", as far as the header tells.

    `layer_groups` lists the layers of each group, `group_windows` how many tokens they see (null: all).
    """
    layers, windows = header.get("layer_groups"), header.get("group_windows")
    most = max((len(request.tables) for request in state.requests), default=1)
    count = max(most, *(len(known) for known in (layers, windows) if isinstance(known, list | tuple)), 1)
    return [_words_of_group(group, _item(layers, group), _item(windows, group)) for group in range(count)]


def _item(values: object, index: int) -> object:
    return values[index] if isinstance(values, list | tuple) and index < len(values) else None


def _words_of_group(group: int, layers: object, window: object) -> str:
    facts = []
    if isinstance(layers, list | tuple):
        listed = ", ".join(map(str, layers[:8])) + (f" … {layers[-1]}" if len(layers) > 8 else "")
        facts.append(f"layer{'' if len(layers) == 1 else 's'} {listed}")
    facts += [f"the last {counted(window, 'token')}"] if isinstance(window, int) else []
    return f"group {group}" + (f": {'; '.join(facts)}" if facts else "")
