"""The block table in an operating system's words, and the four places where the words stop being true."""

from minivllm.views.block_table_picture import Link, Translation
from minivllm.views.pool_state import PoolState, RequestState
from minivllm.views.theme import counted

ENGINE, OPERATING_SYSTEM = "engine", "operating system"
WORDS = [(ENGINE, "the engine's"), (OPERATING_SYSTEM, "an operating system's")]
AS_PAGING = {
    "position": "virtual address", "logical block": "virtual page", "offset": "offset in the page",
    "physical block": "page frame", "slot": "physical address",
}  # fmt: skip


def as_paging(chain: list[Link]) -> list[Link]:
    """The same chain, each link under the name that paging gives it; bytes are bytes in both."""
    said = [(Link(AS_PAGING.get(link.label, link.label), link.formula, link.value)) for link in chain]
    return [link._replace(formula=link.formula.replace("block_table[", "page_table[")) for link in said]


def limits(state: PoolState, request: RequestState, place: Translation | None, num_tables: int) -> list[str]:
    """Where the analogy holds for this request, and where it breaks, each with this moment's numbers."""
    table = request.tables[0] if request.tables else ()
    num_shared = sum(state.blocks[block_id].ref_count > 1 for block_id in set(table))
    tables = "one table serves all layers and heads" if num_tables == 1 else f"{num_tables} tables, by layer group"
    entry = place.logical_block if place else 0
    return [
        f"holds: a process has a page table; this request has a block table ({tables})",
        f"holds: frames are shared by reference count; {counted(num_shared, 'block')} of this table "
        f"{'is' if num_shared == 1 else 'are'} in another table too",
        f"breaks: no page faults; all {counted(len(table), 'block')} are in the pool before a step begins",
        f"breaks: pages leave one by one; a running request gives back all {counted(len(table), 'block')} or none",
        f"breaks: hardware walks a page table; here the kernel loads block_table[{entry}] itself, for each token",
        "breaks: a page holds bytes of anything; a block holds K and V of whole tokens",
    ]
