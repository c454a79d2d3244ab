"""One request while the events of a pool are folded: its status, its block tables, and what it holds beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from minivllm.views.pool_state import NULL_BLOCK, RequestState


@dataclass(slots=True)
class RequestFold:
    """A request while it is folded."""

    request_id: str
    ordinal: int
    status: str = "waiting"
    num_prompt: int = 0
    num_computed: int = 0
    tables: list[list[int]] = field(default_factory=lambda: [[]])  # by group; null blocks where a window has passed
    reserved_ids: list[int] = field(default_factory=list)  # held, and not in the table yet
    host_ids: tuple[int, ...] = ()  # what was swapped out waits there
    num_preemptions: int = 0

    @property
    def held_ids(self) -> list[int]:
        """By position in the tables, which are equally long."""
        by_position = (block_id for entries in zip(*self.tables, strict=True) for block_id in entries)
        return [block_id for block_id in by_position if block_id != NULL_BLOCK] + self.reserved_ids

    def table(self, group: int) -> list[int]:
        self.tables.extend([] for _ in range(len(self.tables), group + 1))
        return self.tables[group]

    def cut_off(self, num_blocks: int, group: int) -> tuple[int, ...]:
        """Shorten a group's table; what was at its end."""
        table = self.table(group)
        end = tuple(table[-num_blocks:])
        del table[-num_blocks:]
        return end

    def filled(self, block_size: int) -> Iterator[tuple[int, int]]:
        """Each block of the tables, and its slots that hold K and V."""
        for index, block_id in (entry for table in self.tables for entry in enumerate(table)):
            if block_id != NULL_BLOCK:
                yield block_id, min(max(self.num_computed - index * block_size, 0), block_size)

    def frozen(self) -> RequestState:
        return RequestState(
            self.request_id, self.ordinal, self.status, self.num_prompt, self.num_computed,
            tuple(self.tables[0]), self.num_preemptions, tuple(map(tuple, self.tables[1:])), tuple(self.reserved_ids),
            self.host_ids,
        )  # fmt: skip
