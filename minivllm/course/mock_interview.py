"""A timed mock interview as pure functions: (interview, line typed) -> (interview, text to show).

It walks chains: one topic from recall over apply and analyse to design. Each question is answered in words, by a number
where it has one, ticked off, and pressed with its follow-up. The report says what was covered and how fast.
"""

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from random import Random
from typing import Literal

from minivllm.course.interview_report import Asked, report
from minivllm.course.numeric_forms import Problem, grade
from minivllm.course.progress import Json
from minivllm.course.questions import FORMS, LEVELS, Question, groups, problem_of, question, questions
from minivllm.course.quiz import points, ticks_of
from minivllm.errors import ConfigError

CHAINS = {15: 1, 30: 2, 45: 3}  # minutes -> topics; about four minutes for each question with its follow-up
Stage = Literal["asked", "number", "ticking", "follow-up", "ended"]


@dataclass(frozen=True)
class Interview:
    """The questions still to come, the first on the table, and what became of those before."""

    seed: str
    minutes: int
    began: datetime
    queue: tuple[str, ...]
    stage: Stage
    asked_at: datetime
    now_asked: Asked
    done: tuple[Asked, ...] = ()

    @property
    def question(self) -> Question:
        return question(self.queue[0])

    @property
    def problem(self) -> Problem:
        return problem_of(self.queue[0], f"mock/{self.seed}")

    def left(self, now: datetime) -> timedelta:
        return max(self.began + timedelta(minutes=self.minutes) - now, timedelta())

    def to_json(self) -> Json:
        """What progress keeps of it."""
        slips: list[object] = [asked.slip for asked in self.done if asked.slip]
        scores = {asked.id: [asked.num_ticked, asked.num_points] for asked in self.done}
        return {"began": self.began.isoformat(), "minutes": self.minutes, "scores": scores, "slips": slips}


def chain(letter: str, random: Random, taken: frozenset[str] = frozenset()) -> list[str]:
    """Questions of one group, one for each level in order; a level that it lacks at the end is borrowed.

    Design questions are few: a group without one borrows another group's, each of them once.
    """
    found = []
    for level in LEVELS:
        own = [q.id for q in groups()[letter].questions if q.level == level and q.id not in taken]
        others = [q.id for q in questions().values() if q.level == level == LEVELS[-1] and q.id not in taken]
        if own or others:
            found.append(random.choice(own or others))
    return found


def begin(minutes: int, seed: str, now: datetime) -> tuple[Interview, str]:
    """Draw the chains and ask the first question. Raises ConfigError for a length that there is not."""
    if minutes not in CHAINS:
        raise ConfigError(f"a mock interview lasts {', '.join(map(str, CHAINS))} minutes, not {minutes}")
    random = Random(f"mock/{seed}")
    queue: list[str] = []
    for letter in random.sample(sorted(groups()), CHAINS[minutes]):
        queue += chain(letter, random, frozenset(queue))
    first = Interview(seed, minutes, now, tuple(queue), "asked", now, _blank(queue[0]))
    opening = f"{minutes} minutes, {len(queue)} questions. Answer in a line or aloud, then Enter; q ends it."
    return first, f"{opening}\n\n{shown(first, now)}"


def answer(interview: Interview, line: str, now: datetime) -> tuple[Interview, str]:
    """Take one line: an answer, a number, ticks, or the answer to the follow-up."""
    text = line.strip()
    if interview.stage == "ended":
        return interview, "The interview is over."
    if text.lower() == "q" or not interview.left(now):
        ended = replace(interview, stage="ended")
        return ended, ("" if text.lower() == "q" else "Time is up.\n") + closing(ended)
    interview = _noted(interview, text, now)
    match interview.stage:
        case "asked" if interview.queue[0] in FORMS:
            after = replace(interview, stage="number")
            return after, f"With numbers: {after.problem.ask}"
        case "asked":
            return _to_ticks(interview, "")
        case "number":
            return _number(interview, text)
        case "ticking":
            return _ticked(interview, text)
    return _next(interview, text, now)


def shown(interview: Interview, now: datetime) -> str:
    """The question on the table, with the time that is left."""
    asked = interview.question
    minutes, seconds = divmod(int(interview.left(now).total_seconds()), 60)
    return f"({minutes}:{seconds:02d} left) [{asked.id} · {asked.level}] {asked.stem}"


def closing(interview: Interview) -> str:
    """The report."""
    return report(interview.done, len(interview.queue), interview.minutes)


def _blank(question_id: str) -> Asked:
    asked = question(question_id)
    return Asked(asked.id, asked.level, len(asked.points), has_number=asked.id in FORMS)


def _noted(interview: Interview, text: str, now: datetime) -> Interview:
    """The first answer with a digit in it stops the clock of a question that asks for a number."""
    asked = interview.now_asked
    is_answer = interview.stage in ("asked", "number")
    if not (is_answer and asked.has_number and asked.seconds_to_number is None and re.search(r"\d", text)):
        return interview
    seconds = (now - interview.asked_at).total_seconds()
    return replace(interview, now_asked=replace(asked, seconds_to_number=seconds))


def _number(interview: Interview, text: str) -> tuple[Interview, str]:
    verdict = grade(interview.problem, text)
    if not verdict.is_answer and text:
        return interview, f"{verdict.says} An empty line gives up."
    asked = replace(interview.now_asked, is_number_right=verdict.is_right, slip=verdict.slip)
    says = verdict.says if text else "No number."
    worked = "" if verdict.is_right else f"\n  {interview.problem.truth.derivation[-1]}"
    return _to_ticks(replace(interview, now_asked=asked), f"{says}{worked}\n")


def _to_ticks(interview: Interview, says: str) -> tuple[Interview, str]:
    return (
        replace(interview, stage="ticking"),
        f"{says}Key points:\n{points(interview.question)}\nWhich did you name? Numbers, all, or none.",
    )


def _ticked(interview: Interview, text: str) -> tuple[Interview, str]:
    asked = interview.question
    ticks = ticks_of(text, len(asked.points))
    if ticks is None:
        return interview, f"Type the numbers of the points that you named, 1 to {len(asked.points)}, all, or none."
    noted = replace(interview.now_asked, num_ticked=len(ticks))
    return replace(interview, stage="follow-up", now_asked=noted), f"Follow-up: {asked.follow_up}"


def _next(interview: Interview, text: str, now: datetime) -> tuple[Interview, str]:
    """The follow-up is mandatory: an empty line counts as no answer."""
    says = f"  {interview.question.answer}"
    done = (*interview.done, replace(interview.now_asked, has_followed_up=bool(text)))
    queue = interview.queue[1:]
    if not queue:
        ended = replace(interview, queue=queue, done=done, stage="ended")
        return ended, f"{says}\n\n{closing(ended)}"
    after = replace(interview, queue=queue, done=done, stage="asked", asked_at=now, now_asked=_blank(queue[0]))
    return after, f"{says}\n\n{shown(after, now)}"
