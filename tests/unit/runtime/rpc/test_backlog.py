"""Answers that callers do not read: who is refused, who is cut, and who is left alone."""

import asyncio

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip import stream_infer
from services.runtime.rpc.backlog import Backlog
from services.runtime.rpc.rpc import Answer

LIMIT = 64 << 20

MB = 1 << 20
A, B = "ipv4:10.0.0.1:1000", "ipv6:%5B::ffff:10.0.0.2%5D:2000"
AT = {A: ("10.0.0.1", 1000), B: ("10.0.0.2", 2000)}
ANSWER = v2.ModelInferResponse(raw_output_contents=[bytes(MB)]).SerializeToString()
# What frames and headers add to an answer.
OVERHEAD = 100


class Wire:
    """Clients that read what they are told to read, and the kernel's count of it."""

    def __init__(self):
        self.acked = dict.fromkeys(AT.values(), 0)
        self.cuts = []
        self.sent = 0
        self.now = 1000.0
        self.waiting = dict.fromkeys(AT, 0)
        self.backlog = Backlog(LIMIT, lambda: self.sent, lambda: self.now)
        self.backlog.watch(self)

    def acknowledged(self):
        return iter(list(self.acked.items()))

    def cut(self, addresses):
        self.cuts += addresses
        for peer, at in AT.items():
            if at in addresses:
                del self.acked[at]
                self.sent += self.waiting.pop(peer)
        return len(addresses)

    def answer(self, peer, size=MB):
        taken = self.backlog.admit(peer, size)
        self.waiting[peer] = self.waiting.get(peer, 0) + size * taken
        return taken

    def read(self, peer, size=MB):
        self.waiting[peer] -= size
        self.sent += size
        self.acked[AT[peer]] += size + OVERHEAD

    def wait(self, seconds):
        """With a look each second, as a server has it."""
        for _ in range(round(seconds)):
            self.now += 1
            self.backlog.look()

    @property
    def unread(self):
        return next(sample.value for sample in self.backlog.samples() if "unread_response" in sample.family.name)


@pytest.fixture
def wire():
    return Wire()


def test_a_connection_that_reads_nothing_is_refused_more_and_then_cut(wire):
    taken = [wire.answer(A) for _ in range(1000)]
    # Some of it came before anybody looked, and one answer may go beyond.
    assert taken.index(False) <= (LIMIT // 2 + LIMIT // 16) // MB + 1
    assert wire.unread <= LIMIT // 2 + LIMIT // 16 + MB
    wire.wait(12)
    assert wire.cuts == [AT[A]]
    assert wire.unread == 0


def test_others_are_served_meanwhile(wire):
    for _ in range(1000):
        wire.answer(A)
        assert wire.answer(B)
        wire.read(B)
        wire.now += 0.001
    wire.wait(12)
    assert wire.cuts == [AT[A]]


def test_one_that_reads_slowly_but_steadily_is_not_cut(wire):
    for second in range(120):
        while wire.waiting[A] < 20 * MB:
            assert wire.answer(A)
        for _ in range(1 + second % 2):
            wire.read(A)
        wire.wait(1)
    assert wire.cuts == []


def test_one_answer_of_any_size_is_taken(wire):
    assert wire.answer(A, 10 * LIMIT)
    assert not wire.answer(A, MB)
    for _ in range(10):
        wire.read(A, LIMIT)
        wire.wait(1)
    assert wire.answer(A, 10 * LIMIT)
    assert wire.cuts == []


def test_memory_that_is_short_shortens_patience_and_shares():
    AT.update({f"ipv4:10.0.1.1:{port}": ("10.0.1.1", port) for port in range(8)})
    wire = Wire()
    crowd = [peer for peer in AT if peer not in (A, B)]
    for _ in range(100):
        for peer in crowd:
            wire.answer(peer)
        wire.now += 0.01
    assert wire.unread < 2 * LIMIT
    assert wire.answer(B)
    wire.read(B)
    wire.wait(3)
    assert len(wire.cuts) > 1
    assert wire.unread < LIMIT
    for peer in crowd:
        AT.pop(peer)


def test_an_old_connection_that_starts_to_stall_is_found(wire):
    for _ in range(100_000):
        wire.answer(A, 1000)
        wire.read(A, 1000)
    taken = [wire.answer(A) for _ in range(1000)]
    # Its frames and headers of before do not pay for what it leaves now.
    assert sum(taken) <= (LIMIT // 2 + LIMIT // 8) // MB + 1
    wire.wait(25)
    assert wire.cuts == [AT[A]]


def test_answers_whose_callers_left_are_forgotten(wire):
    for _ in range(1000):
        wire.answer(A)
        # Nothing of it reaches the other end.
        wire.waiting[A] -= MB
        wire.sent += MB
        wire.now += 0.01
        wire.backlog.look()
    wire.wait(30)
    assert wire.unread == 0
    assert wire.cuts == []


async def test_a_stream_whose_client_does_not_read_is_read_no_further(monkeypatch):
    monkeypatch.setattr(stream_infer, "_UNREAD_OF_ONE", 4 * MB)
    asked = []

    async def infer(data, _):
        asked.append(data)
        return Answer(bytes(MB), ())

    async def requests():
        for number in range(200):
            yield b"%d" % number
            await asyncio.sleep(0)

    answers = stream_infer.stream_handler(infer).stream_stream(requests(), Caller())
    await anext(answers)
    for _ in range(500):
        await asyncio.sleep(0)
    assert len(asked) < 10
    # It goes on as the client reads.
    assert len([answer async for answer in answers]) == 199
    assert len(asked) == 200


async def test_streams_together_are_refused_answers_when_too_many_wait(monkeypatch):
    monkeypatch.setattr(stream_infer, "_UNREAD", 8 * MB)

    async def infer(data, _):
        return Answer(ANSWER, ())

    async def requests():
        for number in range(8):
            yield b"%d" % number
            await asyncio.sleep(0)

    handler = stream_infer.stream_handler(infer).stream_stream
    streams = [handler(requests(), Caller()) for _ in range(4)]
    first = [await anext(answers) for answers in streams]
    assert len(first) == 4
    for _ in range(500):
        await asyncio.sleep(0)
    rest = [v2.ModelStreamInferResponse.FromString(answer) async for answer in streams[0]]
    assert len(rest) == 7
    last = [v2.ModelStreamInferResponse.FromString(answer) async for answer in streams[3]]
    assert any("not read yet" in answer.error_message for answer in [*rest, *last])
    for answers in streams:
        await answers.aclose()
    # What nobody reads any more is forgotten.
    (answer, *_) = [answer async for answer in handler(requests(), Caller())]
    assert not v2.ModelStreamInferResponse.FromString(answer).error_message


class Caller:
    def auth_context(self):
        return {}

    def invocation_metadata(self):
        return ()
