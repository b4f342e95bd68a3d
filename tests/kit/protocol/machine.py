"""The property machine: random histories on the real scripts, held against a plain model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from perdure.protocol import store
from perdure.protocol.codec import pack_result
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind, NewRequest
from perdure.protocol.transitions.calls import Claim, Failure, Finish, Progress
from perdure.recovery.failures import POLICIES
from tests.kit.protocol.clock import Change, pretended_clock
from tests.kit.protocol.model import QUEUES, Call, World
from tests.kit.protocol.pool import OTHER, TASK, packed

SLOTS = 3


LIFE = 80_000
"""Seconds that may pass in one example: less than a day, after which untouched keys expire."""


DELIVERY = st.sampled_from(["heard", "heard", "heard", "lost reply", "late"])
"""What becomes of a call: ``lost reply`` is applied and not answered; ``late`` may still arrive, or never."""


INDEX = st.integers(0, 5)


FAILURES = (
    FailureKind.UNKNOWN,
    FailureKind.UNKNOWN,
    FailureKind.NETWORK,
    FailureKind.INVALID_REQUEST,
    FailureKind.GPU_ERROR,
    FailureKind.HOST_OOM,
)


ENDS = (FailureKind.WORKER_LOST, FailureKind.CRASH, FailureKind.HOST_OOM)


@dataclass
class Mine:
    """A request as its worker sees it."""

    claim: Claim
    offset: int
    seq: int
    canceled: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.claim.id, self.claim.execution


@dataclass
class Agent:
    """A pretended worker process. It sends one call at a time, and again until it is answered."""

    name: str
    incarnation: str
    model: str
    mine: dict[str, Mine] = field(default_factory=dict)
    unanswered: Call | None = None

    def call(self, verb: str, *rows: Any, **options: Any) -> Call:
        return Call(verb, self.incarnation, self.name, rows, options)

    def hear(self, call: Call, answers: Any) -> None:
        """Act upon an answer as the courier does."""
        self.unanswered = None
        if call.verb == "heartbeat" or call.verb == "claim":
            if (answers if call.verb == "heartbeat" else answers.status) == "reaped":
                self.mine.clear()
            elif call.verb == "claim":
                self.mine |= {claim.id: Mine(claim, claim.offset, claim.seq) for claim in answers.claims}
            return
        for row, answer in zip(call.rows, answers, strict=True):
            identifier = row[0] if isinstance(row, tuple) else row.id
            mine = self.mine.get(identifier)
            if mine is None:
                continue
            if answer == "cancel":
                mine.canceled = True
            elif call.verb == "progress" and answer == "ok":
                mine.offset, mine.seq = row.offset + row.outputs, row.seq
            elif call.verb != "renew" or answer != "ok":
                del self.mine[identifier]

    def progress(self, mine: Mine, outputs: int, stepped: float, ahead: int = 0) -> Progress:
        claim, offset = mine.claim, mine.offset + ahead
        values = [f"{claim.execution}/{offset + index}" for index in range(outputs)]
        return Progress(
            id=claim.id,
            execution=claim.execution,
            seq=mine.seq + 1,
            offset=offset,
            outputs=outputs,
            blob=packed([claim.epoch, offset, values]) if outputs else b"",
            state=packed([claim.execution, mine.seq + 1]),
            fingerprint=self.model,
            stepped=stepped,
            brief=mine.seq > claim.seq and not claim.watched,
        )

    def finish(self, mine: Mine, outputs: int, ahead: int = 0) -> Finish:
        row = self.progress(mine, outputs, 0, ahead)
        return Finish(
            id=row.id,
            execution=row.execution,
            offset=row.offset,
            outputs=outputs,
            blob=row.blob,
            result=pack_result(row.id, limit=100),
            seconds=0.5,
        )

    def failure(self, mine: Mine, kind: FailureKind) -> Failure:
        policy = POLICIES[kind]
        return Failure(
            id=mine.claim.id,
            execution=mine.claim.execution,
            kind=kind,
            reason="it broke",
            traceback="it broke",
            charge=policy.charge,
            crash=policy.crash,
            loss=policy.loss,
            retry=policy.retry,
        )


def runnable(agent: Agent) -> list[Mine]:
    """What it may run: nothing that another model began."""
    return [mine for mine in agent.mine.values() if mine.claim.fingerprint in ("", agent.model)]


WEIGHTS = {
    "submit": 2, "cancel": 1, "requeue": 1, "delete": 1, "submit_again": 2, "enqueue_again": 2, "other_job": 1,
    "claim": 3, "all_claim": 2, "progress": 6, "leave_a_gap": 1, "renew": 1,
    "finish": 3, "fail": 2, "release": 1, "release_foreign": 1, "stop": 1, "confirm_cancels": 1, "kill": 3, "wake": 4,
    "guardian_comes_late": 1, "time_passes": 4, "sweep": 2, "promote": 1, "expire": 1, "replay": 4,
}  # fmt: skip


VERBS = [verb for verb, weight in WEIGHTS.items() for _ in range(weight)]


class Requests(RuleBasedStateMachine):
    """Producers, three workers and reapers on one Redis."""

    connection: redis.Redis
    world_type = World
    pauses = (0.5, 2, 6, 31, 617, 3701)
    """Seconds that may pass between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.connection.flushall()
        self.world = self.world_type(self.connection)
        self.numbers = itertools.count()
        self.calls: list[Call] = []
        self.dead: list[Agent] = []
        self.passed = 0.0
        self.agents = [self.process(f"w{index}", "m1" if index < 2 else "m2") for index in range(3)]

    def process(self, name: str, model: str) -> Agent:
        return Agent(name, f"{name}.{next(self.numbers)}", model)

    # --- how a call goes -----------------------------------------------------------------------------

    def tell(self, call: Call, delivery: str = "heard", agent: Agent | None = None) -> bool:
        """Send a call; True if it was answered."""
        self.calls.append(call)
        if agent is not None and call.verb not in ("claim", "heartbeat"):
            agent.unanswered = call
        if delivery == "late":
            return False
        answers = self.world.apply(call)
        if delivery == "lost reply":
            return False
        if agent is not None:
            agent.hear(call, answers)
            if call.verb == "claim" and answers.status == "reaped":
                agent.incarnation = f"{agent.name}.{next(self.numbers)}"
        return True

    def answered(self, agent: Agent, delivery: str) -> bool:
        """Whether it waits for no answer; what it waits for is sent again first."""
        return agent.unanswered is None or self.tell(agent.unanswered, delivery, agent)

    def free(self, index: int, delivery: str, *, busy: bool = True) -> Agent | None:
        """A worker that can send something; ``busy``: one that has something to run."""
        agents = [agent for agent in self.agents if runnable(agent) or not busy]
        agent = agents[index % len(agents)] if agents else None
        return agent if agent and self.answered(agent, delivery) and (runnable(agent) or not busy) else None

    def one(self, index: int, which: int, delivery: str) -> tuple[Agent | None, Mine | None]:
        """A worker, and one of those that it runs."""
        agent = self.free(index, delivery)
        runs = runnable(agent) if agent else []
        return agent, runs[which % len(runs)] if runs else None

    # --- producers -----------------------------------------------------------------------------------

    @initialize(numbers=st.lists(st.integers(1, 4), min_size=1, max_size=2), retries=st.integers(0, 2))
    def begin(self, numbers, retries):
        """Not with nothing to do."""
        for number, queue in zip(numbers, QUEUES, strict=False):
            self.enqueue(number, queue, TASK, retries, 0, 0, "heard")
        for agent in self.agents:
            self.beat(agent)
            self.ask(agent)

    @rule(verb=st.sampled_from(VERBS), index=INDEX, which=INDEX, size=st.integers(0, 2), delivery=DELIVERY)
    def step(self, verb, index, which, size, delivery):
        """One rule for all verbs: chosen by their weights, each in every history."""
        getattr(self, verb)(index, which, size, delivery)

    def submit(self, index: int, which: int, size: int, delivery: str) -> None:
        if len(self.world.requests) < 12:
            task = OTHER if which == 0 else TASK
            deadline, delay = (0, 0, 0, 0, 8, 50)[which], (0, 0, 0, 0, 2, 2)[index]
            self.enqueue(size + 1, QUEUES[index % 2], task, size, deadline, delay, delivery)

    def enqueue(
        self, number: int, queue: str, task: str, retries: int, deadline: float, delay: float, delivery: str
    ) -> None:
        rows = [
            NewRequest(
                id=f"r{next(self.numbers)}",
                nonce=f"n{index}",
                queue=queue,
                task=task,
                payload=packed(index),
                max_retries=retries,
                result_ttl=1000,
                failure_ttl=2000,
                description=task,
                deadline=deadline,
                delay=delay,
            )
            for index in range(number)
        ]
        call = Call("enqueue", rows=tuple(rows))
        if delivery == "heard" or not self.tell(call, delivery):
            self.tell(call)  # a producer asks until it is answered

    def cancel(self, index: int, which: int, size: int, delivery: str) -> None:
        known = list(self.world.requests)
        self.tell(Call("cancel", rows=((known[(index + 6 * which) % len(known)], ""),)), delivery)

    def requeue(self, index: int, which: int, size: int, delivery: str) -> None:
        """A dead letter; or what is none, which is refused."""
        known = [item.id for item in self.world.living if item.verdict == "failed"] or list(self.world.requests)
        self.world.requeue(known[index % len(known)])

    def delete(self, index: int, which: int, size: int, delivery: str) -> None:
        """RQ's Job.delete of what waits, runs or has ended."""
        self.world.delete(self.known(index, which))

    def submit_again(self, index: int, which: int, size: int, delivery: str) -> None:
        """Another request under an id that was used before; where that is still there, it is refused."""
        item = self.world.requests[self.known(index, which, gone=size > 0)]
        row = replace(item.new, nonce=f"n{next(self.numbers)}", payload=packed(which), max_retries=size)
        self.tell(Call("enqueue", rows=(row,)))

    def enqueue_again(self, index: int, which: int, size: int, delivery: str) -> None:
        """RQ's Queue.enqueue_job, as rq-scheduler calls it, of what has ended, or else of what runs or waits."""
        ended = [item.id for item in self.world.living if item.ended]
        self.world.enqueue_again(ended[index % len(ended)] if ended and size else self.known(index, which))

    def other_job(self, index: int, which: int, size: int, delivery: str) -> None:
        """RQ's enqueue of another job under the id."""
        self.world.other_job(self.known(index, which))

    def known(self, index: int, which: int, *, gone: bool = False) -> str:
        """Some id; ``gone``: one whose request is there no more, if there is any."""
        found = [name for name, item in self.world.requests.items() if item.gone or not gone]
        found = found or list(self.world.requests)
        return found[(index + 6 * which) % len(found)]

    # --- workers -------------------------------------------------------------------------------------

    def claim(self, index: int, which: int, size: int, delivery: str) -> None:
        if agent := self.free(index, delivery, busy=False):
            self.ask(agent, delivery)

    def all_claim(self, index: int, which: int, size: int, delivery: str) -> None:
        for number in range(len(self.agents)):
            self.claim(index + number, which, size, "heard")

    def ask(self, agent: Agent, delivery: str = "heard") -> None:
        task = next((mine.claim.task for mine in agent.mine.values()), "")
        free = SLOTS - len(agent.mine) if task else 1
        if free > 0:
            slots = {TASK: SLOTS, OTHER: SLOTS}
            self.tell(agent.call("claim", task=task, free=free, slots=slots, known=tuple(agent.mine)), delivery, agent)

    def progress(self, index: int, which: int, size: int, delivery: str) -> None:
        """All that it runs, in one call."""
        if agent := self.free(index, delivery):
            stepped = 2.0 if which < 2 else 0.1
            rows = [agent.progress(mine, size, stepped) for mine in runnable(agent) if not mine.canceled]
            self.tell(agent.call("progress", *rows), delivery, agent)

    def leave_a_gap(self, index: int, which: int, size: int, delivery: str) -> None:
        """What a worker would send to a Redis that has lost its last second."""
        agent, mine = self.one(index, which, "heard")
        if agent and mine:
            row: Any = agent.finish(mine, 1, ahead=2) if size else agent.progress(mine, 1, 0.1, ahead=2)
            self.world.apply(agent.call("finish" if size else "progress", row))

    def renew(self, index: int, which: int, size: int, delivery: str) -> None:
        if agent := self.free(index, delivery):
            self.tell(agent.call("renew", *(mine.key for mine in agent.mine.values())), delivery, agent)

    def finish(self, index: int, which: int, size: int, delivery: str) -> None:
        agent, mine = self.one(index, which, delivery)
        if agent and mine:
            self.tell(agent.call("finish", agent.finish(mine, size)), delivery, agent)

    def fail(self, index: int, which: int, size: int, delivery: str) -> None:
        agent, mine = self.one(index, which, delivery)
        if agent and mine:
            self.tell(agent.call("fail", agent.failure(mine, FAILURES[which])), delivery, agent)

    def release(self, index: int, which: int, size: int, delivery: str) -> None:
        """All that it holds, as at a stop."""
        if agent := self.free(index, delivery):
            self.hand_back(agent, list(agent.mine.values()), size, delivery)

    def release_foreign(self, index: int, which: int, size: int, delivery: str) -> None:
        """What another model began."""
        for agent in self.agents:
            foreign = [mine for mine in agent.mine.values() if mine not in runnable(agent)]
            if foreign and self.answered(agent, delivery):
                self.hand_back(agent, foreign, 1, delivery)

    def hand_back(self, agent: Agent, mine: list[Mine], delay: float, delivery: str = "heard") -> None:
        marks = ["" if item.claim.fingerprint == agent.model else item.claim.fingerprint for item in mine]
        keys = [item.key for item in mine]
        self.tell(agent.call("release", *keys, delay=delay, fingerprints=tuple(marks)), delivery, agent)

    def stop(self, index: int, which: int, size: int, delivery: str) -> None:
        """RQ's stop command."""
        agent, mine = self.one(index, which, delivery)
        if agent and mine:
            self.tell(agent.call("stop", mine.key), delivery, agent)

    def confirm_cancels(self, index: int, which: int, size: int, delivery: str) -> None:
        for agent in self.agents:
            keys = [mine.key for mine in agent.mine.values() if mine.canceled]
            if keys and self.answered(agent, delivery):
                self.tell(agent.call("cancel", *keys), delivery, agent)

    def kill(self, index: int, which: int, size: int, delivery: str) -> None:
        """A process ends; its guardian reaps, unless it died as well. Another one takes its place."""
        number = index % len(self.agents)
        agent = self.agents[number]
        self.dead.append(agent)
        self.agents[number] = self.process(agent.name, agent.model)
        if which > 1:
            self.tell(agent.call("reap", kind=ENDS[size]))
            self.all_claim(index, which, size, "heard")

    def wake(self, index: int, which: int, size: int, delivery: str) -> None:
        """A process that was taken for dead goes on where it stood: what it holds may be another's by now."""
        asleep = [(agent, mine) for agent in self.dead for mine in runnable(agent)]
        holder = {item.id: item.execution for item in self.world.living}
        # What tells most: somebody else holds it now.
        others = [pair for pair in asleep if holder.get(pair[1].claim.id, "") not in ("", pair[1].claim.execution)]
        chosen = others or asleep
        if not chosen:
            return
        agent, mine = chosen[(index + 6 * size) % len(chosen)]
        calls = [
            agent.call("finish", agent.finish(mine, 1)),
            agent.call("progress", agent.progress(mine, 1, 0.1)),
            agent.call("fail", agent.failure(mine, FailureKind.UNKNOWN)),
            agent.call("release", mine.key, delay=0, fingerprints=("",)),
            agent.call("renew", mine.key),
            agent.call("stop", mine.key),
        ]
        self.tell(calls[which], "lost reply")

    def guardian_comes_late(self, index: int, which: int, size: int, delivery: str) -> None:
        if self.dead:
            self.tell(self.dead[index % len(self.dead)].call("reap", kind=ENDS[size]), delivery)

    # --- time, reapers, the network ------------------------------------------------------------------

    def time_passes(self, index: int, which: int, size: int, delivery: str) -> None:
        """Often, all workers send a heartbeat after it; else none of them, or one."""
        seconds = self.pauses[index]
        if self.passed + seconds > LIFE:
            return
        self.passed += seconds
        self.world.let_pass(seconds)
        for number, agent in enumerate(self.agents):
            if which > 2 or (which == 2 and number == size):
                self.beat(agent)

    def beat(self, agent: Agent) -> None:
        call = agent.call("heartbeat", agent.model)
        if self.world.apply(call) == "reaped":
            agent.mine.clear()
            agent.unanswered = None
            agent.incarnation = f"{agent.name}.{next(self.numbers)}"

    def sweep(self, index: int, which: int, size: int, delivery: str) -> None:
        """As if sweeps had gone on all the time; or as the first one after a pause, which may judge nobody."""
        self.tell(Call("sweep", options={"settled": size > 0}))

    def promote(self, index: int, which: int, size: int, delivery: str) -> None:
        self.tell(Call("promote"))

    def expire(self, index: int, which: int, size: int, delivery: str) -> None:
        self.tell(Call("expire"))

    def replay(self, index: int, which: int, size: int, delivery: str) -> None:
        """An earlier call again, verbatim; or one that has not yet arrived."""
        distance = 1 + index + 6 * which * size
        self.world.apply(self.calls[-min(distance, len(self.calls))])

    # --- the end -------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Healthy workers end what was accepted, and nothing stays behind."""
        world = self.world
        if not world.sound:
            return
        agents = [self.process(f"last{index}", model) for index, model in enumerate(("m1", "m1", "m2"))]
        for _ in range(150):
            world.patient = True
            agents.append(agents.pop(0))  # or the same one would always be the first to ask
            for agent in agents:
                self.beat(agent)
                self.ask(agent)
                foreign = [mine for mine in agent.mine.values() if mine not in runnable(agent)]
                if foreign:
                    self.hand_back(agent, foreign, 1)
                for mine in runnable(agent):
                    canceled = world.requests[mine.claim.id].cancel
                    self.tell(
                        agent.call("cancel", mine.key) if canceled else agent.call("finish", agent.finish(mine, 1)),
                        agent=agent,
                    )
            self.tell(Call("sweep", options={"settled": True}))
            self.tell(Call("promote"))
            world.patient = False
            world.check()
            if all(item.ended for item in world.living) and world.plain <= world.refused:
                break
            world.let_pass(4)
        left = [item for item in world.living if not item.ended]
        assert not left, f"never ended: {left}"
        assert world.plain <= world.refused, f"never run: {world.plain - world.refused}"
        for _ in range(3):
            world.let_pass(3701)
            self.tell(Call("sweep", options={"settled": True}))
            self.tell(Call("expire"))
        assert not world.living
        stems = (
            "job",
            "output",
            "checkpoint",
            "history",
            "results",
            "held",
            "execution",
            "executions",
            "leases",
            "suspects",
        )
        left_over = [
            name
            for stem in stems
            for identifier, name in world.look.below(stem).items()
            if identifier not in world.loose or world.look.ttl[name] < 0
        ]
        assert not left_over, f"left behind: {left_over}"
        assert not world.look.zset(key("checkpoints"))
        super().teardown()


def drive(
    connection: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    *,
    examples: int,
    steps: int,
    kind: type[Requests] = Requests,
    planted: Mapping[str, Change] = MappingProxyType({}),
) -> None:
    """Run a machine over scripts in which mistakes may be planted."""
    numbers = itertools.count()
    # Named in the order of their making, so that an example can be run again.
    monkeypatch.setattr(store, "new_stem", lambda: f"e{next(numbers)}-")
    machine = type(kind.__name__, (kind,), {"connection": connection})
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate],
        print_blob=False,  # with Phase.shrink a failure takes longer than a test may
    )
    with pretended_clock(planted):
        run_state_machine_as_test(machine, settings=profile)
