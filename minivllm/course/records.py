"""Where guesses and tries are kept: anything that maps a key to a small record of plain values.

The course's progress file is one; `Kept` below lives in memory, for tests and where no file can be written.
"""

import threading
from collections.abc import Mapping
from typing import Protocol

Plain = str | int | float | bool | None
Record = dict[str, Plain | dict[str, int]]


class Records(Protocol):
    """Records by kind ("guess", "exercise") and key ("05.2"); all methods are safe to call from any thread."""

    @property
    def seed(self) -> str:
        """What a learner's numbers are drawn from."""
        ...

    def read(self, kind: str, key: str) -> Record | None: ...
    def read_all(self, kind: str) -> Mapping[str, Record]: ...
    def write(self, kind: str, key: str, record: Record) -> None: ...


class Kept:
    """Records in memory."""

    def __init__(self, seed: str = "example") -> None:
        self.seed = seed
        self._records: dict[str, dict[str, Record]] = {}
        self._lock = threading.Lock()

    def read(self, kind: str, key: str) -> Record | None:
        with self._lock:
            found = self._records.get(kind, {}).get(key)
            return dict(found) if found is not None else None

    def read_all(self, kind: str) -> Mapping[str, Record]:
        with self._lock:
            return {key: dict(record) for key, record in self._records.get(kind, {}).items()}

    def write(self, kind: str, key: str, record: Record) -> None:
        with self._lock:
            self._records.setdefault(kind, {})[key] = dict(record)
