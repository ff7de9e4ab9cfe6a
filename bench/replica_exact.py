"""A replica once more, by processes of simpy that wait for each other: the oracle of replica.py, for hundreds of agents.

It shares the cache with `serve`, and nothing else: no running sums, no calendar of ends, every step's counts anew.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import simpy
from replica import Replica, Trace, warmed


class _Agent:
    """One agent of `serve_exact`."""

    def __init__(self, env: Any, trace: Trace, i: int) -> None:
        self.document = int(trace.document[i])
        self.length = int(trace.document_tokens[self.document])
        self.question, self.answer = int(trace.question[i]), int(trace.answer[i])
        self.own = self.needs = 0
        self.made = 0
        self.answered = env.event()
        self.first = self.end = math.nan


def serve_exact(replica: Replica, trace: Trace, *, warm: Iterable[int] = ()) -> tuple[np.ndarray, np.ndarray, int]:
    """(first, end, loads) as `serve` has them, by simpy and without any running sum: for hundreds of agents, not for millions."""
    replica.check(trace)
    env = simpy.Environment()
    policy, (device, host) = replica.policy, warmed(replica, trace, warm)
    agents = [_Agent(env, trace, i) for i in range(len(trace.arrival))]
    ready: list[_Agent] = []
    running: list[_Agent] = []
    slots = simpy.Resource(env, capacity=replica.slots)
    link = simpy.Resource(env, capacity=1)
    holders: dict[int, list[_Agent]] = defaultdict(list)
    there: dict[int, Any] = {}  # events of documents that are being loaded
    signal = {"ready": env.event(), "released": env.event()}
    loads = 0

    def announce(name: str) -> None:
        signal[name].succeed()
        signal[name] = env.event()

    def load(document: int, size: float) -> Generator[Any, Any, None]:
        nonlocal loads
        loads += 1
        with link.request() as mine:
            yield mine
            if policy == "shared":
                while not device.put(document, size, [d for d, who in holders.items() if who]):
                    yield signal["released"]
            rate = replica.host_bytes_per_s if host.touch(document) else replica.disk_bytes_per_s
            if document not in host and size <= host.capacity:
                host.put(document, size)
            yield env.timeout(size / rate)

    def agent(mine: _Agent, arrival: float) -> Generator[Any, Any, None]:
        yield env.timeout(arrival)
        size = mine.length * replica.token_bytes
        if policy == "shared":
            holders[mine.document].append(mine)
            host.touch(mine.document)
            if mine.document in there:
                yield there[mine.document]
            elif not device.touch(mine.document):
                there[mine.document] = env.event()
                yield from load(mine.document, size)
                device.touch(mine.document)
                there.pop(mine.document).succeed()
            mine.needs = mine.question
        elif policy == "copies":
            slot = slots.request()
            yield slot
            yield from load(mine.document, size)
            mine.own, mine.needs = mine.length, mine.length + mine.question
        else:
            mine.needs = mine.length + mine.question
        ready.append(mine)
        announce("ready")
        yield mine.answered
        if policy == "copies":
            slots.release(slot)
        if policy == "shared":
            holders[mine.document].remove(mine)
            announce("released")

    def step() -> list[tuple[_Agent, int]]:
        """Rows of each agent in the next step."""
        rows = [(who, min(replica.chunk, max(who.needs - who.own, 0)) or 1) for who in running]
        left = replica.max_extend - sum(own for who, own in rows if who.needs - who.own > 1)
        while ready and (policy == "copies" or len(running) < replica.slots):
            who = ready[0]
            own = min(replica.chunk, who.needs - who.own)
            if who.needs - who.own > 1 and own > left:
                break
            left -= own if who.needs - who.own > 1 else 0
            running.append(ready.pop(0))
            rows.append((who, own))
        return rows

    def engine() -> Generator[Any, Any, None]:
        while True:
            if not (ready or running):
                yield signal["ready"]
            rows = step()
            together = [(who, own, who.length if policy == "shared" else 0) for who, own in rows]
            answering = [(who, own, shared) for who, own, shared in together if who.made]
            reading = [(who, own, shared) for who, own, shared in together if not who.made]
            documents = {who.document: shared for who, _, shared in together}
            yield env.timeout(
                replica.seconds(
                    len(answering),
                    sum(own for _, own, _ in reading),
                    sum(shared for *_, shared in answering)
                    + sum(own * (shared + who.own) for who, own, shared in reading),
                    sum(documents.values()),
                    sum(who.own + own for who, own, _ in together),
                )
            )
            for who, own in rows:
                who.own += own
                if who.own < who.needs:
                    continue
                who.made += 1
                if who.made == 1:
                    who.first = env.now
                if who.made == who.answer:
                    who.end = env.now
                    running.remove(who)
                    who.answered.succeed()
            # Whoever was set free by the end of this step, and asks for the next one, has asked.
            yield env.timeout(0)

    for mine, arrival in zip(agents, trace.arrival.tolist(), strict=True):
        env.process(agent(mine, arrival))
    env.process(engine())
    env.run()
    return np.array([who.first for who in agents]), np.array([who.end for who in agents]), loads
