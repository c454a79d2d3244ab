"""W11, the dashboard: a running engine ten times a second, under sliders that change its load, or a saved run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from minivllm.course.engine_frames import EngineRun, Frame, Load
from minivllm.errors import MiniVLLMError
from minivllm.views.dashboard_picture import Chosen, DashboardPicture, buttons, draw, sliders
from minivllm.views.sketch import Choice, Control, accepted, seek, with_control
from minivllm.views.sketch_view import SketchView


class Room(Protocol):
    """What drives the engine; lab/engine_room.py is one. `ask` only leaves a wish."""

    is_playing: bool
    failure: str
    said: str
    wished: Load

    @property
    def choices(self) -> Mapping[str, Sequence[float]]: ...

    @property
    def header(self) -> Mapping[str, object]: ...

    @property
    def frames(self) -> Sequence[Frame]: ...

    def ask(self, wish: str, value: object = None) -> None: ...
    def follow(self, follower: Callable[[], None]) -> Callable[[], None]: ...


class Dashboard(SketchView):
    """`Dashboard.follow(room)`: buttons, sliders, seconds; or `Dashboard.replay(run)`: step, run, seconds."""

    def __init__(self, room: Room | None, runs: Mapping[str, EngineRun]) -> None:
        self._room, self._runs = room, runs
        self._chosen = Chosen(run=next(iter(runs), ""))
        self._live_header = room.header if room is not None else {}
        super().__init__()
        self._stop_following = room.follow(self.refresh) if room is not None else lambda: None

    @staticmethod
    def follow(room: Room) -> "Dashboard":
        """Watch and drive an engine. Raises MiniVLLMError for what is no engine room."""
        if not all(hasattr(room, name) for name in ("ask", "follow", "frames", "choices")):
            raise MiniVLLMError(f"Dashboard.follow watches an EngineRoom(llm), not {type(room).__name__}")
        return Dashboard(room, {})

    @staticmethod
    def replay(runs: EngineRun | Mapping[str, EngineRun]) -> "Dashboard":
        """Look at a saved run again, frame by frame, or at several by their titles."""
        named = {str(runs.header.get("title", "")): runs} if isinstance(runs, EngineRun) else runs
        if not isinstance(named, Mapping) or not named or not all(isinstance(r, EngineRun) for r in named.values()):
            raise MiniVLLMError(
                f"Dashboard.replay draws an EngineRun (EngineRun.load(path)), not {type(runs).__name__}"
            )
        return Dashboard(None, named)

    def drawn(self) -> DashboardPicture:
        room, controls = self._room, self._controls()
        if room is None:
            run = self._runs[self._chosen.run]
            return draw(run.frames, run.header, self._chosen, controls)
        return draw(room.frames, self._live_header, self._chosen, controls, room.failure, room.said)

    def stop(self) -> None:
        self._stop_following()
        super().stop()

    def _controls(self) -> list[Control]:
        if self._room is not None:
            return [*buttons(self._room.is_playing), *sliders(self._room.choices, self._room.wished)]
        titles = [(title, title) for title in self._runs]
        return [Choice("run", "run", titles, self._chosen.run)] if len(titles) > 1 else []

    def _moved(self, control: str, value: object) -> None:
        own = self._controls()
        if self._room is not None and control in {known.name for known in own}:
            self._room.ask(control, accepted(own, control, value))
        elif control == "step":
            frame = seek(self.drawn()["steps"], value)
            self._chosen = replace(self._chosen, frame=frame)
        else:
            chosen = with_control(self._chosen, self.drawn()["controls"], control, value)
            self._chosen = replace(chosen, frame=None) if control == "run" else chosen
