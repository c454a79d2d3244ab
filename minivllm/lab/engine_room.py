"""A live LLM under a load that may be changed while it runs: who watches sees frames, who acts leaves a wish.

Invariant: one thread drives the engine at a time, and it alone changes anything; `ask` only leaves a wish in a queue,
which is read between two steps. The thread comes when there is something to do and goes when the room is paused.
"""

import threading
from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path
from queue import SimpleQueue

from minivllm.collector import older_objects_frozen
from minivllm.course.engine_frames import EngineRun, Frame, Load
from minivllm.course.frame_fold import FrameFold
from minivllm.errors import ConfigError, MiniVLLMError, short
from minivllm.lab.room_clock import RoomClock, step_seconds
from minivllm.lab.room_load import Guests, choices_of, possible, text_of
from minivllm.llm import LLM
from minivllm.request import SamplingParams
from minivllm.text_engine import Checked, Generation

BUTTONS = ("start", "pause", "one step", "reset", "save")
MOST_WAITING = 1024  # who comes then is turned away
MOST_FRAMES = 6000  # ten minutes; of a longer run the last ones are kept
LIMITS = ("token_budget", "batch_limit")
SAVED_AS = Path("engine_room.json")
Wish = tuple[str, float]  # a button, or a setting of the load and its value


class EngineRoom:
    """`room = EngineRoom(llm, Load(rate=4))`; `room.ask("start")` from anywhere, or `room.run(50)` to wait for it.

    With `step_s` each step counts that many seconds: the same seed then gives the same frames, times of steps apart.
    Raises ConfigError for an engine that is not idle.
    """

    def __init__(self, llm: LLM, load: Load | None = None, *, seed: int = 0, step_s: float | None = None) -> None:
        if not isinstance(llm, LLM):
            raise ConfigError(f"EngineRoom drives an LLM: EngineRoom(LLM(...)), not {type(llm).__name__}")
        if llm.engine.has_work or not llm.reset_prefix_cache():
            raise ConfigError("EngineRoom: the engine has requests or pinned prefixes; finish, abort or unpin them")
        self.llm, self._seed, self._step_s = llm, seed, step_seconds(step_s)
        self.choices = choices_of(llm.engine.built_config)
        self._text, self.prompts = text_of(llm, seed)
        self.wished = possible(load, self.choices)  # by the engine, once it has read all that was asked
        self.is_playing = self._is_closed = False
        self.failure = self.said = ""
        self._followers: list[Callable[[], None]] = []
        self._wishes: SimpleQueue[Wish] = SimpleQueue()
        self._guard, self._turn = threading.Lock(), threading.Lock()  # the thread's life; who drives
        self._thread: threading.Thread | None = None
        self._stop_listening: Callable[[], None] = lambda: None
        self._generations: list[Generation] = []
        self._fold: FrameFold
        self._begin(self.wished)

    @property
    def header(self) -> dict[str, object]:
        """Plain facts of the engine, of where it runs, and of the load."""
        limits = self.llm.engine.built_config
        own = {"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_batched_tokens}
        return self.llm.trace_header() | own | {"prompts": self.prompts, "room_seed": self._seed, "live": "live"}

    @property
    def frames(self) -> list[Frame]:
        return self._fold.frames

    @property
    def load(self) -> Load:
        """What is in force."""
        return self._fold.load

    def follow(self, follower: Callable[[], None]) -> Callable[[], None]:
        """Call `follower` after each frame, on the engine's thread; the returned function ends that."""
        self._followers.append(follower)
        return lambda: self._followers.remove(follower) if follower in self._followers else None

    def ask(self, wish: str, value: object = None) -> None:
        """Leave a wish: a button, or a setting and its value. Raises MiniVLLMError for what there is not."""
        if self._is_closed:
            raise MiniVLLMError("this engine room is closed: make another EngineRoom(llm)")
        wanted = 0.0 if wish in BUTTONS else self._checked(wish, value)
        if wish not in BUTTONS:
            self.wished = self.wished.changed(wish, wanted)
        self._wishes.put((wish, wanted))
        with self._guard:
            if self._thread is None:
                drive = older_objects_frozen()(self._drive)
                self._thread = threading.Thread(target=drive, name="minivllm-engine-room", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was asked is done and the room is paused; False when that took too long."""
        with self._guard:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def stop(self) -> None:
        """Pause, and wait for the thread to end."""
        self.ask("pause")
        self.wait()

    def run(self, num_steps: int, **settings: float) -> list[Frame]:
        """Change settings, take steps here and now; the frames that came of it. Raises ConfigError while it plays."""
        if self._is_closed:
            raise ConfigError("this engine room is closed: make another EngineRoom(llm)")
        while not self.is_playing and not self.wait(timeout_s=0.05):
            pass
        if self.is_playing:
            raise ConfigError("the engine room plays: ask('pause') first")
        wanted = {name: self._checked(name, value) for name, value in settings.items()}
        num_frames = len(self.frames)
        with self._turn:
            for wish in wanted.items():
                self.wished = self.wished.changed(*wish)
                self._obey(wish)
            try:
                for _ in range(num_steps):
                    self._one_step()
            finally:
                self._halt()
        return self.frames[num_frames:]

    def reset(self) -> None:
        """Pause, drop all requests and cached prefixes, begin again at second 0; every block must be free then."""
        self.stop()
        self.ask("reset")
        self.wait()

    def recorded(self) -> EngineRun:
        """The run so far, to be saved or replayed."""
        return EngineRun(self.header | {"live": "recorded"}, tuple(self.frames))

    def count_steps(self, step_s: float | None) -> None:
        """From now on a step counts so many seconds; None: what passes on the clock of the machine."""
        self._step_s = step_seconds(step_s)
        with self._turn:
            self._clock.halt()
            self._clock.step_s = self._step_s

    def empty(self) -> None:
        """Pause, drop all requests and cached prefixes; frames and sliders stay. Every block must be free then."""
        self.stop()
        with self._turn:
            self._empty()
            self._halt()

    def close(self) -> None:
        """Empty the engine, stop listening and give it back as it was; nothing can be asked any more."""
        self.empty()
        self._is_closed = True
        self._stop_listening()
        built = self.llm.engine.built_config
        self.llm.engine.limit(built.max_num_seqs, built.max_num_batched_tokens)

    def _drive(self) -> None:
        """Be the thread: read wishes, advance, and end when there is neither."""
        while True:
            with self._guard:
                if not self.is_playing and self._wishes.empty():
                    self._thread = None
                    return
            try:
                with self._turn:
                    while not self._wishes.empty():
                        self._obey(self._wishes.get())
                    if self.is_playing:
                        self._advance()
                    else:
                        self._halt()
            except Exception as error:  # nobody sees a thread's traceback: the views show it
                self._fail(error)
            if not self.is_playing:
                self._tell()

    def _obey(self, wish: Wish) -> None:
        name, value = wish
        if name in ("start", "one step"):
            self.failure = ""
        match name:
            case "start":
                self.is_playing = True
            case "pause":
                self.is_playing = False
            case "one step":
                self._one_step()
            case "reset":
                self._empty()
                self._begin(self._fold.load)
            case "save":
                try:
                    self.said = f"{len(self.frames)} frames were saved to {self.recorded().save(SAVED_AS)}"
                except MiniVLLMError as error:  # a folder that cannot be written stops nobody
                    self.said = str(error)
            case _:
                self._set(name, value)

    def _advance(self) -> None:
        """Let in who has come, then one step, or a rest while nobody is there."""
        self._clock.run()
        self._let_in()
        if self.llm.engine.has_work:
            self._step()
        else:
            self._clock.rest(self._guests.next_s)
            self._fold.tick()

    def _one_step(self) -> None:
        """A step of the engine, even if somebody has to come first."""
        self._let_in()
        if not self.llm.engine.has_work:
            if self._guests.next_s == inf:
                raise ConfigError("nobody is there and nobody comes: raise the rate")
            self._clock.skip_to(self._guests.next_s)
            self._let_in()
        self._clock.run()
        self._step()

    def _halt(self) -> None:
        """Nothing goes on: no step is under way, no time passes, and all that happened is in a frame."""
        self.llm.text_engine.catch_up()
        self._clock.halt()
        self._fold.catch_up()
        self._tidy()

    def _step(self) -> None:
        num_frames, num_steps = len(self._fold.frames), self._fold.num_steps
        self._clock.count_step()
        self.llm.text_engine.step()
        if len(self._fold.frames) != num_frames or self._fold.num_steps == num_steps:  # ten a second, or it failed
            self._tidy()

    def _let_in(self) -> None:
        for guest in self._guests.due(self._clock()):
            if len(self.llm.engine.scheduler.waiting) >= MOST_WAITING:
                self._fold.turn_away()
                continue
            wish = SamplingParams(temperature=0, max_tokens=guest.num_output, ignore_eos=True, detokenize=False)
            request_id = f"r{next(self._numbers)}"
            self._fold.expect(request_id, guest.due_s)
            generation = self.llm.text_engine.add(Checked(None, guest.token_ids), wish, request_id=request_id)
            self._generations.append(generation)

    def _tidy(self) -> None:
        """Forget who has ended. Raises the error that ended one of them."""
        failed = next((g.error for g in self._generations if g.error), None)
        self._generations = [g for g in self._generations if not g.is_finished]
        if len(self._fold.frames) > 2 * MOST_FRAMES:
            self._fold.frames = self._fold.frames[-MOST_FRAMES:]  # another list: who draws the old one goes on
        if failed:
            raise failed

    def _set(self, name: str, value: float) -> None:
        load = self._fold.load.changed(name, value)
        if name in LIMITS:
            self.llm.engine.limit(int(load.batch_limit), int(load.token_budget))
        self._fold.load = load
        self._fold.note("slider", f"{name.replace('_', ' ')} {value:g}")
        self._guests.change(load, self._clock())

    def _empty(self) -> None:
        self.llm.text_engine.catch_up()
        for generation in self._generations:
            self.llm.text_engine.abort(generation)
        pool = self.llm.engine.kv.pool
        assert self.llm.reset_prefix_cache() and pool.num_free == pool.num_usable, "a block leaked"

    def _begin(self, load: Load) -> None:
        """A clock at 0, nobody there, nothing counted."""
        self._stop_listening()
        self._clock = RoomClock(self._step_s)
        self._generations, self._numbers = [], count()
        self._guests = Guests(self._text, load, self._seed)
        fold = self._fold = FrameFold(self.llm.config.num_blocks, load, self._clock)
        fold.followers.append(self._tell)
        self.llm.engine.limit(int(load.batch_limit), int(load.token_budget))
        self._stop_listening = self.llm.events.listen(fold.apply, wants_hash=False)
        self.failure = self.said = ""

    def _tell(self) -> None:
        for follower in list(self._followers):
            follower()

    def _fail(self, error: Exception) -> None:
        self.is_playing = False
        self._clock.halt()
        self.failure = str(error) if isinstance(error, MiniVLLMError) else f"{type(error).__name__}: {error}"

    def _checked(self, name: str, value: object) -> float:
        values = self.choices
        if name not in values:
            raise MiniVLLMError(f"there is no {short(name)}; there are: {', '.join((*BUTTONS, *values))}")
        if isinstance(value, bool) or value not in values[name]:
            raise MiniVLLMError(f"{name} must be one of {', '.join(map(str, values[name]))}, not {short(value)}")
        return next(known for known in values[name] if known == value)
