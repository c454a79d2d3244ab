"""W11, the dashboard: a running engine ten times a second, under sliders that change its load, or a saved run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from minivllm.course.engine_frames import EngineRun, Frame, Load
from minivllm.errors import MiniVLLMError
from minivllm.views.dashboard_picture import Chosen, DashboardPicture, buttons, draw, sliders
from minivllm.views.sketch import Control, accepted, seek, with_control
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
    """`Dashboard.follow(room)` or `Dashboard.replay(run)`; controls: seconds; live buttons and sliders; else step."""

    def __init__(self, room: Room | None, run: EngineRun | None) -> None:
        self._room, self._run = room, run
        self._chosen = Chosen()
        self._header = room.header if room is not None else run.header if run is not None else {}
        super().__init__()
        self._stop_following = room.follow(self.refresh) if room is not None else lambda: None

    @staticmethod
    def follow(room: Room) -> "Dashboard":
        """Watch and drive an engine."""
        return Dashboard(room, None)

    @staticmethod
    def replay(run: EngineRun) -> "Dashboard":
        """Look at a saved run again, frame by frame."""
        if not isinstance(run, EngineRun):
            raise MiniVLLMError(f"Dashboard.replay draws an EngineRun (EngineRun.load(path)), not {type(run).__name__}")
        return Dashboard(None, run)

    def drawn(self) -> DashboardPicture:
        if self._room is None:
            return draw(self._run.frames if self._run else (), self._header, self._chosen)
        return draw(
            self._room.frames, self._header, self._chosen, self._controls(), self._room.failure, self._room.said
        )

    def stop(self) -> None:
        self._stop_following()
        super().stop()

    def _controls(self) -> list[Control]:
        room = self._room
        return [*buttons(room.is_playing), *sliders(room.choices, room.wished)] if room is not None else []

    def _moved(self, control: str, value: object) -> None:
        own = self._controls()
        if self._room is not None and control in {known.name for known in own}:
            self._room.ask(control, accepted(own, control, value))
        elif control == "step":
            frame = seek(self.drawn()["steps"], value)
            self._chosen = replace(self._chosen, frame=frame)
        else:
            self._chosen = with_control(self._chosen, self.drawn()["controls"], control, value)
