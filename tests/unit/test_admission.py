"""How many requests a replica lets in, by how long answers take."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from elasticrec.serving.admission import BACK_OFF, LATE, LEAST, Admission
from elasticrec.serving.guard import Guard, Protection


def test_quick_answers_let_all_in_that_the_configuration_allows() -> None:
    admission = Admission(96, 2.0)
    for number in range(1_000):
        admission.answered(0.01, 0.01 * number)
        assert admission.limit == 96


def test_those_let_in_before_a_cut_do_not_cut_again() -> None:
    admission = Admission(96, 2.0)
    for now_s in (10.0, 10.1, 10.5, 10.99):  # let in at 9.0 and after, all of them before the first one's end
        admission.answered(1.0, now_s)
    assert admission.limit == int(96 * BACK_OFF)
    admission.answered(1.0, 11.0)
    assert admission.limit == int(96 * BACK_OFF**2)


def test_it_comes_back_by_one_for_as_many_answers_as_it_lets_in() -> None:
    admission = Admission(40, 2.0)
    admission.answered(LATE * 2.0, 10.0)
    assert admission.limit == 30
    for number in range(31):
        admission.answered(0.1, 11 + number)
    assert admission.limit == 31


@given(st.integers(1, 1_000), st.lists(st.tuples(st.floats(0, 60), st.floats(0, 5))))
def test_it_lets_some_in_and_never_more_than_it_may(most: int, answers: list[tuple[float, float]]) -> None:
    admission, now_s = Admission(most, 2.0), 0.0
    for took_s, later_s in answers:
        now_s += later_s
        admission.answered(took_s, now_s)
        assert min(LEAST, most) <= admission.limit <= most


def test_replicas_refuse_sooner_while_their_answers_take_long() -> None:
    took_s = [0.9]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(took_s[0])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(guard: Guard, path: str) -> int:
        told: list[int] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                told.append(int(str(message["status"])))

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        await guard(scope, receive, send)  # type: ignore[arg-type]
        return told[0]

    async def statuses(guard: Guard, count: int, path: str = "/v1/recommend") -> list[int]:
        return sorted(await asyncio.gather(*(ask(guard, path) for _ in range(count))))

    async def scenario() -> None:
        guard = Guard(app, None, Protection(max_in_flight=16, timeout_ms=2_000))
        assert await statuses(guard, 16, "/v1/recommend:batch") == [200] * 16  # they may take long
        assert await statuses(guard, 16) == [200] * 16  # and were too many
        assert await statuses(guard, 16) == [200] * 12 + [429] * 4
        took_s[0] = 0.0
        for _ in range(40):
            await statuses(guard, 8)
        assert await statuses(guard, 16) == [200] * 16

    asyncio.run(scenario())
