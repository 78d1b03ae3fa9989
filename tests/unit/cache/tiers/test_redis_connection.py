"""Whatever comes on a connection, each command ends once, and a reply is that of the command it stands for."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.redis_connection import AwaitedCommand, GivenUpError, RedisConnection


class Pool:
    """As redis-py's client and pool, connection, writer and transport: what is written is kept."""

    def __init__(self):
        self.connection_pool = self._writer = self.transport = self
        self.written = b""
        self.writes = 0

    def make_connection(self):
        return self

    async def connect(self):
        pass

    async def disconnect(self, *, nowait):
        pass

    def set_protocol(self, protocol):
        pass

    def write(self, data):
        self.written += data
        self.writes += 1

    def writelines(self, parts):
        self.write(b"".join(parts))

    def abort(self):
        pass


class Opened:
    """A connection that is open, what was lost, and the ends of its commands, which are numbered."""

    def __init__(self, limit_seconds=60.0):
        self.pool = Pool()
        self.lost = []
        self.connection = RedisConnection(limit_seconds, lambda _, error: self.lost.append(error))
        self.task = asyncio.get_running_loop().create_task(self.connection.run(self.pool))
        self.questions = []

    def send(self, **how):
        self.questions.append(AwaitedCommand(1))
        self.connection.send(self.questions[-1], (b"%d " % len(self.questions),), **how)

    @property
    def ends(self):
        return [question.reply.result() if question.reply.done() else None for question in self.questions]

    async def close(self):
        self.connection.close()
        await self.task


def reply(number):
    return b"$%d\r\n%d\r\n" % (len(b"%d" % number), number)


CALLS = st.lists(
    st.sampled_from(["send", "answer", "nonsense", "push", "lose", "pause", "resume", "turn"]), max_size=30
)


@given(CALLS, st.randoms(use_true_random=False))
def test_each_command_ends_once_with_its_own_reply_or_is_given_up(calls, random):
    async def run():
        opened = Opened()
        connection, answered = opened.connection, 0
        await connection.opened
        for call in calls:
            if call == "send":
                opened.send(lazy=random.random() < 0.5)
            elif call == "turn":
                await asyncio.sleep(0)
            elif call == "lose":
                connection.connection_lost(None)
            elif call == "pause":
                connection.pause_writing()
            elif call == "resume":
                connection.resume_writing()
            else:
                if call == "answer" and answered < len(opened.questions):
                    answered += 1
                data = {"answer": reply(answered), "nonsense": b"*0\r\n", "push": b">1\r\n+moving\r\n"}[call]
                cuts = sorted(random.randrange(len(data) + 1) for _ in range(3))
                for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                    connection.data_received(data[start:end])
            for number, end in enumerate(opened.ends, 1):
                assert end is None or isinstance(end, GivenUpError) or end == b"%d" % number
        assert len(opened.lost) <= 1
        await opened.close()
        assert None not in opened.ends

    asyncio.run(run())


async def test_commands_of_one_turn_leave_in_one_write_and_one_that_is_not_urgent_with_them():
    opened = Opened()
    await opened.connection.opened
    opened.send(lazy=True)
    await asyncio.sleep(0)
    assert opened.pool.writes == 0
    opened.send()
    opened.send()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (opened.pool.written, opened.pool.writes) == (b"1 2 3 ", 1)
    await opened.close()


async def test_what_is_not_urgent_leaves_by_itself():
    opened = Opened()
    opened.send(lazy=True)
    async with asyncio.timeout(60):
        while not opened.pool.writes:
            await asyncio.sleep(0.001)
    await opened.close()


async def test_nothing_is_written_while_the_other_side_does_not_read():
    opened = Opened()
    await opened.connection.opened
    opened.connection.pause_writing()
    opened.send()
    for _ in range(3):
        await asyncio.sleep(0)
    assert opened.pool.writes == 0
    opened.connection.resume_writing()
    assert opened.pool.written == b"1 "
    await opened.close()


async def test_commands_sent_before_it_is_open_leave_when_it_is():
    opened = Opened()
    opened.send()
    opened.send()
    await opened.connection.opened
    assert (opened.pool.written, opened.pool.writes) == (b"1 2 ", 1)
    await opened.close()
