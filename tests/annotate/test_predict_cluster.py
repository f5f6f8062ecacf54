"""Parts on actors that come late, die and fail, played through with a Ray of the test's own, in any order."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.annotate import cluster
from annatac_scale.annotate.cluster import MOST_DEATHS
from annatac_scale.annotate.labels import Part
from annatac_scale.annotate.predictor import IN_FLIGHT, Asked, PredictTask
from annatac_scale.errors import AnnatacError, InputError
from annatac_scale.progress import Silent
from annatac_scale.train.cluster import Cluster

PARTS = [Part("a", unit, 4000) for unit in range(5)] + [Part("b", unit, 10) for unit in range(4)]
TASK = PredictTask("atlas.zarr", "model", "labels", Asked(), threads=1)
DIES, FAILS = "dies", "fails"


@dataclass(eq=False)
class Answer:
    """Of a call that was made. part: None of ``open``"""

    actor: "Actor"
    part: Part | None


@dataclass(eq=False)
class Actor:
    number: int
    is_open: bool = False
    is_lost: bool = False
    asked: list[Answer] = field(default_factory=list)

    def ask(self, part: list[Any] | None = None) -> Answer:
        assert part is None or self.is_open, "a part for an actor that waits for its place"
        answer = Answer(self, None if part is None else Part(*part))
        self.asked.append(answer)
        assert len(self.asked) <= IN_FLIGHT
        return answer

    @property
    def open(self) -> Any:
        return Remote(self.ask)

    @property
    def run(self) -> Any:
        return Remote(self.ask)


@dataclass(frozen=True)
class Remote:
    remote: Any


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class PlayedRay:
    """Answers one call at a time. next: chooses which, and what becomes of it: None, DIES or FAILS"""

    exceptions = ray.exceptions

    def __init__(self, choose: Any) -> None:
        self._choose = choose
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.answered: dict[Answer, str | None] = {}
        self.crew: Any = None

    def remote(self, _kind: type) -> "PlayedRay":
        return self

    def options(self, **_resources: Any) -> Remote:
        return Remote(self._start)

    def _start(self, _task: dict[str, Any]) -> Actor:
        self.actors.append(Actor(len(self.actors)))
        return self.actors[-1]

    def wait(self, answers: list[Answer], timeout: float) -> tuple[list[Answer], list[Answer]]:
        assert answers, "nothing to wait for, and yet not done"
        lost = [answer for answer in answers if answer.actor.is_lost]
        if lost:
            self.answered[lost[0]] = DIES
            return lost[:1], []
        idle = [one for one in self.actors if one.is_open and not one.is_lost and not one.asked]
        assert not (idle and self.crew._left), "an actor is idle while parts are left"
        answer, what = self._choose(answers)
        if what == DIES:
            answer.actor.is_lost = True
        elif answer.part is None:
            answer.actor.is_open = True
        self.answered[answer] = what
        return [answer], []

    def get(self, answer: Answer) -> list[str] | None:
        answer.actor.asked.remove(answer)
        match self.answered[answer]:
            case "dies":
                raise ray.exceptions.RayActorError()
            case "fails":
                raise ray.exceptions.RayTaskError("run", "traceback", InputError("sample b: damaged"))
        return None if answer.part is None else [f"said of {answer.part.sample}"]

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def play(choose: Any, n: int = 2) -> tuple[list[Part], Told, PlayedRay]:
    """Parts in the order in which they were told to be done."""
    done: list[Part] = []
    told, played = Told(), PlayedRay(choose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "ray", played)
        played.crew = cluster._Crew(TASK, Cluster(n, n), PARTS, told, done.append)
        try:
            played.crew.run()
        finally:
            alive = [actor for actor in played.actors if not actor.is_lost]
            assert set(alive) <= set(played.killed)
    return done, told, played


def first(answers: list[Answer]) -> tuple[Answer, None]:
    return answers[0], None


def test_no_more_actors_are_started_than_there_are_parts() -> None:
    done, told, played = play(first, n=50)
    assert (Counter(done), len(played.actors)) == (Counter(PARTS), len(PARTS))
    assert len(told.lines) == len(PARTS)


@given(data=st.data(), n=st.integers(1, 4))
def test_each_part_is_done_once_whichever_actors_are_lost_and_none_is_idle(
    data: st.DataObject, n: int
) -> None:
    left = data.draw(st.integers(0, MOST_DEATHS - 1), label="deaths")

    def choose(answers: list[Answer]) -> tuple[Answer, str | None]:
        nonlocal left
        answer = data.draw(st.sampled_from(answers))
        dies = left > 0 and data.draw(st.booleans())
        left -= dies
        return answer, DIES if dies else None

    done, told, played = play(choose, n)
    assert Counter(done) == Counter(PARTS)
    lost = sum(actor.is_lost for actor in played.actors)
    assert len([line for line in told.lines if line.startswith("a worker was lost")]) == lost
    assert len(played.actors) == n + lost


def test_parts_of_a_lost_actor_go_to_those_that_have_none() -> None:
    def choose(answers: list[Answer]) -> tuple[Answer, str | None]:
        opens = [answer for answer in answers if answer.part is None and answer.actor.number < 3]
        if opens:
            return opens[0], None
        # The first actor never answers; the one in whose place another is to come does not come.
        others = [answer for answer in answers if answer.actor.number in (1, 2)]
        if others:
            return others[0], None
        return next(answer for answer in answers if answer.actor.number == 0), DIES

    done, _, played = play(choose, n=3)
    assert Counter(done) == Counter(PARTS)
    assert not played.actors[3].is_open


@pytest.mark.parametrize("call", ["open", "run"])
def test_what_an_actor_meets_is_raised_as_it_is(call: str) -> None:
    def choose(answers: list[Answer]) -> tuple[Answer, str | None]:
        return answers[0], FAILS if (answers[0].part is None) == (call == "open") else None

    with pytest.raises(InputError, match=r"^sample b: damaged$"):
        play(choose)


def test_a_part_that_actors_are_lost_with_again_and_again_is_named() -> None:
    def choose(answers: list[Answer]) -> tuple[Answer, str | None]:
        fatal = [answer for answer in answers if answer.part == PARTS[1]]
        return (fatal[0], DIES) if fatal else (answers[0], None)

    with pytest.raises(AnnatacError, match=rf"sample a, cells from 4,000: {MOST_DEATHS} workers were lost"):
        play(choose)


def test_actors_that_are_lost_when_they_begin_are_given_up_after_some_in_a_row() -> None:
    with pytest.raises(AnnatacError, match=f"{MOST_DEATHS} workers in a row, each when it began, were lost"):
        play(lambda answers: (answers[0], DIES))


def test_an_actor_that_begins_ends_the_row_of_those_that_did_not() -> None:
    n_begun = 0

    def choose(answers: list[Answer]) -> tuple[Answer, str | None]:
        nonlocal n_begun
        answer = next((one for one in answers if one.part is None), answers[0])
        if answer.part is None:
            n_begun += 1
            return answer, DIES if n_begun % MOST_DEATHS else None
        return answer, None

    done, told, _ = play(choose, n=2)
    assert Counter(done) == Counter(PARTS)
    assert sum(line.startswith("a worker was lost") for line in told.lines) == 2 * (MOST_DEATHS - 1)
