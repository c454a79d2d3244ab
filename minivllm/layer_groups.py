"""Layers that see all tokens and layers with a sliding window: groups of equally many, each with a block table.

Blocks of all groups come from one pool, so each block holds K and V of `num_rows` layers, whichever group has it. What
a window has passed goes back to the pool, and any group may take it next. Gemma 3 1B, where every sixth layer sees all:

    row            0    1    2    3
    group 0      [ 5] [11] [17] [23]     all tokens
    group 1      [ 0] [ 1] [ 2] [ 3]     the last 512
      ...
    group 6      [24] [25]   -    -      the last 512; two rows of its blocks stay unused

vLLM forms its KV cache groups by the same rule (its "hybrid KV cache manager").
"""

from dataclasses import dataclass

Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class LayerGroups:
    """Which group a layer belongs to, and which row of the group's blocks is its own."""

    windows: Windows  # by group: the widest of its layers; None: they see all
    places: tuple[tuple[int, int], ...]  # by layer: group and row

    @property
    def num_rows(self) -> int:
        return 1 + max(row for _, row in self.places)

    @property
    def layers(self) -> list[list[int]]:
        """By group, its layers in the order of their rows."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        return [[layer for layer in order if self.places[layer][0] == group] for group in range(len(self.windows))]


def group_layers(num_layers: int, windows: Windows) -> LayerGroups:
    """Groups for layers with these windows; `windows` is empty where every layer sees all tokens.

    Where layers of both kinds stand together, the first group sees all:
    group_layers(3, (9, None, 9)).places == ((1, 0), (0, 0), (2, 0)).
    """
    windows = windows or (None,) * num_layers
    see_all = [layer for layer, window in enumerate(windows) if window is None]
    see_some = [layer for layer, window in enumerate(windows) if window is not None]
    num_rows = min(len(see_all), len(see_some)) or num_layers
    groups = [kind[i : i + num_rows] for kind in (see_all, see_some) for i in range(0, len(kind), num_rows)]
    places = {layer: (group, row) for group, layers in enumerate(groups) for row, layer in enumerate(layers)}
    return LayerGroups(
        windows=tuple(_widest([windows[layer] for layer in layers]) for layers in groups),
        places=tuple(places[layer] for layer in range(num_layers)),
    )


def one_group(num_layers: int, windows: Windows) -> LayerGroups:
    """All layers in one table: nothing is freed that any of them sees."""
    return LayerGroups((_widest(list(windows)),), tuple((0, layer) for layer in range(num_layers)))


def _widest(windows: list[int | None]) -> int | None:
    narrow = [window for window in windows if window is not None]
    return max(narrow) if windows and len(narrow) == len(windows) else None
