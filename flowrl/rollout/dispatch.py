"""Jobs over servers that may fail: each goes to the least busy one, and none is lost.

Nothing here knows what a job is or how a server is asked: the three functions of `Service` do. A
server that fails is taken out with all that it was doing, tried again every RETRY_S seconds, and
used again once `revive` has succeeded.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

RETRY_S = 2.0  # between two tries to bring a server back

logger = logging.getLogger(__name__)


class BadAnswer(Exception):
    """A job came back without a usable result; the server may be sound."""


class ServerLost(Exception):
    """A server cannot be used until it was revived."""


@dataclass(eq=False)
class Server:
    """What the trainer knows of a server."""

    url: str
    is_live: bool = False
    is_returning: bool = False  # it answers, and is being made ready for use
    num_outstanding: int = 0  # jobs that it works on
    problem: str = "was not asked yet"

    def take_out(self, problem: str) -> None:
        """Use it no more, and say so once per reason."""
        if self.is_live or problem != self.problem:
            logger.warning("%s is taken out: %s", self.url, problem)
        self.is_live, self.problem = False, problem

    def put_back(self) -> None:
        if self.problem:
            logger.info("%s is in use", self.url)
        self.is_live, self.problem = True, ""


@dataclass(frozen=True)
class Service(Generic[Job, Result]):
    """How servers are asked. All three raise ServerLost, and `ask` also BadAnswer."""

    ask: Callable[[Server, Job], Awaitable[Result]]
    watch: Callable[[Server], Awaitable[None]]  # returns never, raises when the server is gone
    revive: Callable[[Server], Awaitable[None]]  # one try


def describe(servers: Sequence[Server]) -> str:
    """Every server with what is wrong with it."""
    return "; ".join(f"{server.url}: {server.problem or 'in use'}" for server in servers)


async def try_to_revive(service: Service, server: Server) -> None:
    """One try to put a server back; it stays out, with its problem, when that fails."""
    try:
        await service.revive(server)
    except ServerLost as error:
        server.take_out(str(error))
    else:
        server.put_back()


async def revive_some(service: Service, servers: Sequence[Server], give_up_s: float) -> None:
    """Try to revive all servers until at least one is in use.

    Raises RuntimeError naming each server and its problem when that takes longer than `give_up_s`.
    """
    deadline = time.monotonic() + give_up_s
    while not any(server.is_live for server in servers):
        await asyncio.gather(*(try_to_revive(service, server) for server in servers))
        if any(server.is_live for server in servers):
            return
        if time.monotonic() + RETRY_S > deadline:
            raise RuntimeError(
                f"no rollout server was usable within {give_up_s:g} s: {describe(servers)}"
            )
        await asyncio.sleep(RETRY_S)


async def dispatch(
    jobs: Sequence[Job],
    servers: Sequence[Server],
    service: Service[Job, Result],
    *,
    max_outstanding: int,
    max_retries: int,
    give_up_s: float,
) -> list[Result]:
    """Do every job and return the results in the order of the jobs.

    A server works on at most `max_outstanding` jobs at once. A job that failed, or whose server
    did, is tried again, elsewhere when there is another server, at most `max_retries` times.

    Raises RuntimeError when a job's tries are used up, naming the last server and its answer, and
    when no server was usable for `give_up_s` seconds, naming each with its problem.
    """
    return await _Dispatch(jobs, servers, service, max_outstanding, max_retries, give_up_s).run()


class _Dispatch(Generic[Job, Result]):
    """The state of one `dispatch`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        servers: Sequence[Server],
        service: Service[Job, Result],
        max_outstanding: int,
        max_retries: int,
        give_up_s: float,
    ) -> None:
        self.jobs, self.servers, self.service = jobs, servers, service
        self.max_outstanding, self.max_retries = max_outstanding, max_retries
        self.give_up_s = give_up_s
        self.results: dict[int, Result] = {}
        self.failed_on: dict[int, list[str]] = {}  # place of a job -> URLs, one per failed try
        self.waiting = deque(range(len(jobs)))
        self.asked: dict[asyncio.Task[Result], tuple[Server, int]] = {}
        self.cared_for: dict[asyncio.Task[Any], Server] = {}  # watches and revivals
        self.last_live = time.monotonic()

    async def run(self) -> list[Result]:
        for server in self.servers:
            server.num_outstanding = 0
        try:
            while len(self.results) < len(self.jobs):
                self._care()
                self._send()
                done, _ = await asyncio.wait(
                    {*self.asked, *self.cared_for},
                    timeout=RETRY_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    if task in self.asked:
                        self._take_result(task)
                    elif task in self.cared_for:
                        self._end_care(task)
                self._give_up_when_alone()
            await self._let_return()
        finally:
            tasks = [*self.asked, *self.cared_for]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [self.results[place] for place in range(len(self.jobs))]

    def _care(self) -> None:
        """Every server has a task beside its jobs: it is watched, or brought back."""
        for server in self.servers:
            if server not in self.cared_for.values():
                care = self.service.watch(server) if server.is_live else self._bring_back(server)
                self.cared_for[asyncio.ensure_future(care)] = server

    async def _bring_back(self, server: Server) -> None:
        await try_to_revive(self.service, server)
        while not server.is_live:
            await asyncio.sleep(RETRY_S)
            await try_to_revive(self.service, server)

    async def _let_return(self) -> None:
        """Wait for servers that are on their way back, once each.

        A call shorter than that would otherwise cut it off every time, and none would come back.
        """
        while tasks := [task for task, server in self.cared_for.items() if server.is_returning]:
            await asyncio.wait(tasks, timeout=0.05)

    def _end_care(self, task: asyncio.Task[Any]) -> None:
        server = self.cared_for.pop(task)
        try:
            task.result()
        except ServerLost as error:
            self._lose(server, str(error))

    def _send(self) -> None:
        while self.waiting:
            place = self.waiting[0]
            free = [
                server
                for server in self.servers
                if server.is_live and server.num_outstanding < self.max_outstanding
            ]
            if not free:
                return
            tried = self.failed_on.get(place, [])
            server = min(free, key=lambda s: (s.url in tried, s.num_outstanding))
            self.waiting.popleft()
            server.num_outstanding += 1
            task = asyncio.ensure_future(self.service.ask(server, self.jobs[place]))
            self.asked[task] = (server, place)

    def _take_result(self, task: asyncio.Task[Result]) -> None:
        server, place = self.asked.pop(task)
        server.num_outstanding -= 1
        try:
            self.results[place] = task.result()
        except BadAnswer as error:
            logger.warning("request %d to %s failed: %s", place, server.url, error)
            self._retry(server, place, str(error))
        except ServerLost as error:
            self._retry(server, place, str(error))
            self._lose(server, str(error))

    def _retry(self, server: Server, place: int, problem: str) -> None:
        tried = self.failed_on.setdefault(place, [])
        tried.append(server.url)
        if len(tried) > self.max_retries:
            raise RuntimeError(
                f"request {place} failed {len(tried)} times, the last on {server.url}: {problem}"
            )
        self.waiting.appendleft(place)

    def _lose(self, server: Server, problem: str) -> None:
        """Take a server out and send what it was doing elsewhere."""
        server.take_out(problem)
        for task, (owner, place) in list(self.asked.items()):
            if owner is server and not task.done():  # what is done has its own result or error
                task.cancel()
                del self.asked[task]
                server.num_outstanding -= 1
                self._retry(server, place, problem)
        for task, owner in list(self.cared_for.items()):
            if owner is server:
                task.cancel()
                del self.cared_for[task]

    def _give_up_when_alone(self) -> None:
        now = time.monotonic()
        if any(server.is_live for server in self.servers):
            self.last_live = now
        elif now - self.last_live > self.give_up_s:
            raise RuntimeError(
                f"no rollout server was usable for {self.give_up_s:g} s: {describe(self.servers)}"
            )
