"""The exercises of the notebooks as data: every one by its id, such as "05.2"; check.py judges answers to them."""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache

from minivllm.course.exercises import nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb09, nb12
from minivllm.course.exercises.exercise import Exercise
from minivllm.errors import ConfigError, short

NOTEBOOKS = (nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb09, nb12)


@lru_cache
def exercises() -> Mapping[str, Exercise]:
    """All exercises by id, in order."""
    return {exercise.id: exercise for notebook in NOTEBOOKS for exercise in notebook.EXERCISES}


def find(exercise_id: str) -> Exercise:
    """One exercise. Raises ConfigError, with the nearest ids."""
    known = exercises()
    wanted = exercise_id if isinstance(exercise_id, str) else str(exercise_id)
    if wanted not in known:
        near = get_close_matches(wanted, known, n=3, cutoff=0.5) or list(known)[:3]
        raise ConfigError(f"no exercise is called {short(exercise_id)}; close: {', '.join(near)}")
    return known[wanted]
