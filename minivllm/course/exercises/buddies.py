"""Exercise 04.3: a heap of buddies. The learner's class must do what the engine's does, stretch by stretch.

Every case ends with a take, and only what that gives is compared: the case that is shown is the first that goes wrong.
"""

from random import Random

from minivllm.course.exercises.exercise import Case, CodeProblem, Facts, Subject, named
from minivllm.course.exercises.place import Place

STUB = '''class MyBuddies:
    """Stretches of 2**k places: split in halves to fit, merged when both are free."""

    def __init__(self, num_places):           # a power of two
        self.starts = {num_places: [0]}       # of the free stretches, by length

    def take(self, size): ...                 # -> range(start, start + length), or None when nothing fits

    def free(self, stretch): ...              # merge with its buddy as long as that is free'''


class SplitBuddies:
    """The learner's interface in the simplest form; its wrong relatives below differ in one decision each."""

    lowest_first = True

    def __init__(self, num_places: int) -> None:
        self.starts: dict[int, list[int]] = {num_places: [0]}

    def take(self, size: int) -> range | None:
        length = self.smallest(size)
        if length is None:
            return None
        start = (min if self.lowest_first else max)(self.starts[length])
        self.starts[length].remove(start)
        while length > self.wanted(size):
            length //= 2
            self.starts.setdefault(length, []).append(self.given_back(start, length))
            start = self.kept(start, length)
        return range(start, start + length)

    def free(self, run: range) -> None:
        start, length = run.start, len(run)
        while self.buddy(start, length) in self.starts.get(length, []):
            self.starts[length].remove(self.buddy(start, length))
            start, length = min(start, self.buddy(start, length)), length * 2
        self.starts.setdefault(length, []).append(start)

    def smallest(self, size: int) -> int | None:
        return min((length for length, starts in self.starts.items() if starts and length >= size), default=None)

    def wanted(self, size: int) -> int:
        return 1 << (size - 1).bit_length()

    def buddy(self, start: int, length: int) -> int:
        return start ^ length

    def given_back(self, start: int, length: int) -> int:
        return start + length

    def kept(self, start: int, length: int) -> int:
        return start


class NeverMerges(SplitBuddies):
    def free(self, run: range) -> None:
        self.starts.setdefault(len(run), []).append(run.start)


class MergesOnce(SplitBuddies):
    def free(self, run: range) -> None:
        start, length = run.start, len(run)
        if self.buddy(start, length) in self.starts.get(length, []):
            self.starts[length].remove(self.buddy(start, length))
            start, length = min(start, self.buddy(start, length)), length * 2
        self.starts.setdefault(length, []).append(start)


class NeverSplits(SplitBuddies):
    def wanted(self, size: int) -> int:
        return 1 << 62


class TakesLargest(SplitBuddies):
    def smallest(self, size: int) -> int | None:
        return max((length for length, starts in self.starts.items() if starts and length >= size), default=None)


class MergesNeighbours(SplitBuddies):
    """Takes the next stretch of equal length for the buddy, whoever was split from whom."""

    def buddy(self, start: int, length: int) -> int:
        return start + length


class SplitsTooFar(SplitBuddies):
    def wanted(self, size: int) -> int:
        return 1 << size.bit_length() - 1


class HandsOutSize(SplitBuddies):
    """Splits as far as it should, and hands out as much as was asked for."""

    def take(self, size: int) -> range | None:
        run = super().take(size)
        return run and run[:size]


class RoundsWhenFreed(HandsOutSize):
    def free(self, run: range) -> None:
        super().free(range(run.start, run.start + self.wanted(len(run))))


class KeepsUpperHalf(SplitBuddies):
    def given_back(self, start: int, length: int) -> int:
        return start

    def kept(self, start: int, length: int) -> int:
        return start + length


def is_take(step: object) -> bool:
    return isinstance(step, int) and step > 0


def run_heap(subject: Subject, case: Case) -> object:
    """What the last take of a script gives: sizes to take (positive), and which of the taken to free (−1 − index)."""
    num_places, *script = case
    heap = subject(num_places)
    take, free = getattr(heap, "take", None), getattr(heap, "free", None)
    if not callable(take) or not callable(free):
        raise AttributeError("the class needs the methods take and free")
    fits = getattr(heap, "fits", None)  # the engine's is asked first, and asserts
    given: list[object] = []
    for step in script:
        assert isinstance(step, int), "a script is a list of whole numbers"
        if step > 0:
            given.append(take(step) if not callable(fits) or fits(step) else None)
        elif isinstance(run := given[-1 - step], range):
            free(run)
    if all(run is None for run in given):
        raise NotImplementedError
    return {f"take({script[-1]})": given[-1]}


def buddy_heap(random: Random, facts: Facts) -> CodeProblem:
    """Scripts of takes and frees; the reference is the engine's own class."""
    reference = Place("minivllm.engine.allocators", "Buddies").load()
    scripts: list[Case] = [(16, 3, 5, 2), (16, 4, 4, -1, -2, 16), (16, 2, 2, 4, -2, -1, -3, 16)]
    scripts += [(8, 2, 2, 2, 2, -3, -2, 4), (16, 4, 4, 4, -2, -3, 8), (8, 1, 1, 1, 1, -2, -3, 2, -1, 2)]
    scripts += [_script(random) for _ in range(6)]
    ends = [(script, end) for script in scripts for end in range(2, len(script) + 1) if is_take(script[end - 1])]
    cases = tuple(dict.fromkeys(script[:end] for script, end in ends))
    wrong = {
        "never merged: freed stretches must join their buddy, or the pool stays in pieces": NeverMerges,
        "merged once only: the merged stretch may have a free buddy too; go on": MergesOnce,
        "never split: cut a stretch that is too long in halves until it fits": NeverSplits,
        "largest stretch taken: take the smallest that is long enough, and keep long ones whole": TakesLargest,
        "neighbour taken for buddy: the buddy is start ^ length; two neighbours need not stem from one stretch":
            MergesNeighbours,
        "rounded down: the next power of two is the one above, for 3 places 4": SplitsTooFar,
        "not rounded: hand out all of what was split off; `free` sees no other length": HandsOutSize,
        "not rounded when taken: hand out all of what was split off, a power of two": RoundsWhenFreed,
        "upper half kept: keep the lower half and give the upper one back, as the engine does": KeepsUpperHalf,
    }  # fmt: skip
    question = (
        "Write the class: take(size) hands out a stretch of the next power of two, free(stretch) takes it back. A case "
        "is the number of places, then a size for each take, and −1, −2, ... where the first, second, ... is freed."
    )
    return CodeProblem(question, STUB, reference, cases, named(wrong), run_heap)


def _script(random: Random) -> Case:
    """A pool of 64 places and twenty steps; what is freed was taken before and is not freed twice."""
    heap, num_taken = SplitBuddies(64), 0
    script: list[int] = []
    live: dict[int, range] = {}  # by index of the take
    for _ in range(20):
        if live and random.random() < 0.45:
            index = random.choice(list(live))
            heap.free(live.pop(index))
            script.append(-1 - index)
            continue
        size = random.randrange(1, 20)
        run = heap.take(size)
        if run is not None:
            live[num_taken] = run
        script.append(size)
        num_taken += 1
    return (64, *script)
