"""Jobs over servers that fail: what is tried again, where, how often and for how long."""

import asyncio
import time
from collections.abc import Callable

import pytest

from flowrl.rollout import dispatch
from flowrl.rollout.dispatch import BadAnswer, Server, ServerLost, Service


async def nothing(server: Server) -> None:
    """A watch that never ends."""
    await asyncio.Event().wait()


async def lost(server: Server) -> None:
    raise ServerLost("is gone")


async def sound(server: Server) -> None:
    return


def run_jobs(
    num_jobs: int,
    servers: list[Server],
    ask: Callable,
    *,
    watch: Callable = nothing,
    revive: Callable = lost,
    max_outstanding: int = 4,
    max_retries: int = 2,
    give_up_s: float = 5.0,
) -> list:
    service = Service(ask=ask, watch=watch, revive=revive)
    return asyncio.run(
        dispatch.dispatch(
            range(num_jobs),
            servers,
            service,
            max_outstanding=max_outstanding,
            max_retries=max_retries,
            give_up_s=give_up_s,
        )
    )


def live_servers(count: int) -> list[Server]:
    return [Server(f"http://{place}", is_live=True, problem="") for place in range(count)]


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RETRY_S", 0.02)


def test_results_keep_the_order_of_the_jobs_whichever_ends_first() -> None:
    async def ask(server: Server, job: int) -> int:
        await asyncio.sleep(0.001 * (job * 7 % 11))
        return job * job

    assert run_jobs(200, live_servers(3), ask) == [job * job for job in range(200)]
    assert run_jobs(0, live_servers(1), ask) == []


def test_slow_server_gets_fewer_jobs_and_none_more_than_the_bound() -> None:
    busy, most, num_done = [0, 0], [0, 0], [0, 0]
    servers = live_servers(2)

    async def ask(server: Server, job: int) -> int:
        place = servers.index(server)
        busy[place] += 1
        most[place] = max(most[place], busy[place])
        await asyncio.sleep([0.05, 0.005][place])
        busy[place] -= 1
        num_done[place] += 1
        return job

    assert run_jobs(120, servers, ask, max_outstanding=4) == list(range(120))
    assert most == [4, 4] and num_done[1] > 3 * num_done[0] > 0


def test_failed_job_is_tried_again_on_another_server() -> None:
    asked: dict[int, list[str]] = {}

    async def ask(server: Server, job: int) -> str:
        asked.setdefault(job, []).append(server.url)
        if len(asked[job]) < 3 and job % 2:
            raise BadAnswer("no")
        return server.url

    run_jobs(20, live_servers(3), ask)
    for job, urls in asked.items():
        assert len(urls) == len(set(urls)) == (3 if job % 2 else 1)


def test_job_that_always_fails_ends_after_its_retries_naming_the_server() -> None:
    asked: list[str] = []

    async def ask(server: Server, job: int) -> int:
        if job != 5:
            await asyncio.sleep(60)
        asked.append(server.url)
        raise BadAnswer("`choices` is None")

    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"request 5 failed 3 times, .*http://\d: `choices` is"):
        run_jobs(6, live_servers(2), ask, max_retries=2)
    assert len(asked) == 3 and time.monotonic() - started < 5


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("who", ["job", "watch"])
def test_lost_server_leaves_its_jobs_to_others_and_comes_back(who: str) -> None:
    servers, is_ill = live_servers(2), True
    order: list[tuple[int, str]] = []

    async def ask(server: Server, job: int) -> int:
        if is_ill and server is servers[0]:
            if who == "job":
                raise ServerLost("hung up")
            await asyncio.sleep(60)
        await asyncio.sleep(0.01)
        order.append((job, server.url))
        return job

    async def watch(server: Server) -> None:
        await asyncio.sleep(0.03)
        if is_ill and server is servers[0]:
            raise ServerLost("does not answer")
        await asyncio.Event().wait()

    async def revive(server: Server) -> None:
        nonlocal is_ill
        assert server is servers[0] and not server.is_live
        if len(order) < 40:
            raise ServerLost("still ill")
        is_ill = False

    results = run_jobs(120, servers, ask, watch=watch, revive=revive)
    assert results == list(range(120)) and sorted(job for job, _ in order) == results
    assert {url for _, url in order[:40]} == {"http://1"}
    assert {url for _, url in order[60:]} == {"http://0", "http://1"}
    assert all(server.is_live and not server.problem for server in servers)


@pytest.mark.usefixtures("quick_retries")
def test_without_any_server_it_ends_in_time_naming_each() -> None:
    async def ask(server: Server, job: int) -> int:
        raise ServerLost(f"{server.url} hung up")

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="within 0.3 s|for 0.3 s") as error:
        run_jobs(2, live_servers(2), ask, give_up_s=0.3, max_retries=9)
    assert 0.3 < time.monotonic() - started < 3
    assert "http://0: is gone; http://1: is gone" in str(error.value)
    with pytest.raises(RuntimeError, match="http://0: is gone; http://1: is gone"):
        service = Service(ask=ask, watch=nothing, revive=lost)
        asyncio.run(dispatch.revive_some(service, [Server("http://0"), Server("http://1")], 0.1))


@pytest.mark.usefixtures("quick_retries")
def test_only_server_may_come_back_in_the_middle() -> None:
    num_asked = 0

    async def ask(server: Server, job: int) -> int:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            raise ServerLost("restarts")
        await asyncio.sleep(0.01)
        return job

    assert run_jobs(10, live_servers(1), ask, revive=sound) == list(range(10))


def test_wrong_request_is_no_fault_of_a_server() -> None:
    async def ask(server: Server, job: int) -> int:
        raise ValueError("token 99 is unknown")

    with pytest.raises(ValueError, match="token 99"):
        run_jobs(3, live_servers(2), ask)


def test_calls_shorter_than_a_servers_return_do_not_cut_it_off() -> None:
    sound_one, back = live_servers(2)
    back.take_out("was killed")
    num_tries = 0

    async def ask(server: Server, job: int) -> int:
        await asyncio.sleep(0.02)
        return job

    async def revive(server: Server) -> None:
        nonlocal num_tries
        num_tries += 1
        server.is_returning = True
        await asyncio.sleep(0.3)
        server.is_returning = False

    assert run_jobs(1, [sound_one, back], ask, revive=revive) == [0]
    assert back.is_live and num_tries == 1


def test_a_server_that_does_not_answer_holds_up_no_call() -> None:
    sound_one, hung = live_servers(2)
    hung.take_out("hangs")

    async def ask(server: Server, job: int) -> int:
        return job

    started_at = time.monotonic()
    assert run_jobs(1, [sound_one, hung], ask, revive=nothing) == [0]
    assert not hung.is_live and time.monotonic() - started_at < 2
