"""The buttons call what they were given, from any thread, and say what came of it."""

import threading

import pytest

from minivllm.errors import MiniVLLMError
from minivllm.views.engine_buttons import EngineButtons


def buttons_with_log() -> tuple[EngineButtons, list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []

    def action(name: str, value: str) -> str:
        log.append((name, value))
        return f"{name} did {value}"

    def fail(_: str) -> str:
        raise MiniVLLMError("the pool is full: finish one")

    names = ("add", "step", "block size")
    actions = {name: (lambda value, name=name: action(name, value)) for name in names}
    return EngineButtons({**actions, "fail": fail}, "Hi", ("block size", [1, 4, 16], 4)), log


@pytest.mark.parametrize(("control", "value", "handed"), [("add", "Hello", "Hello"), ("step", None, "")])
def test_each_button_calls_its_action_and_says_what_happened(control: str, value: object, handed: str) -> None:
    buttons, log = buttons_with_log()
    buttons.move(control, value)
    assert log == [(control, handed)] and buttons.drawn()["said"] == f"{control} did {handed}"


def test_slider_hands_over_its_value_and_stays_there() -> None:
    buttons, log = buttons_with_log()
    buttons.move("block size", 16)
    assert log == [("block size", "16")] and buttons.drawn()["chosen"] == 16
    with pytest.raises(MiniVLLMError, match="one of"):
        buttons.move("block size", 5)


def test_the_slider_is_no_button() -> None:
    assert buttons_with_log()[0].drawn()["buttons"] == ["add", "step", "fail"]


def test_an_action_that_fails_shows_in_the_status_line() -> None:
    buttons, _ = buttons_with_log()
    buttons._receive(None, {"control": "fail", "value": ""}, None)
    buttons.flush()
    assert buttons.picture["status"] == "the pool is full: finish one"
    buttons.move("add", "x")
    buttons.flush()
    assert buttons.picture["status"] == ""
    buttons.close()


def test_clicks_from_other_threads_all_count() -> None:
    buttons, log = buttons_with_log()
    threads = [threading.Thread(target=buttons.move, args=("step", "")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log) == 8
    buttons.close()


def test_twins_name_every_control() -> None:
    buttons, _ = buttons_with_log()
    bundle = buttons._repr_mimebundle_()
    assert bundle is not None
    assert "[ add ] [ step ]" in str(bundle[0]["text/plain"]) and "block size: 4" in str(bundle[0]["text/plain"])
    assert bundle[0]["image/png"] == buttons.png()
    assert "<object" not in repr(buttons)
