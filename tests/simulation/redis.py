"""A simulated Redis in virtual time, with redis-py's client interface: its scripts are in Python, its faults seeded.

A connection from redis_client.lent_connection speaks the Redis protocol.
"""

import asyncio
from collections import OrderedDict

from hiredis import Reader
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cache.keys import invalidation as purge_board
from cache.policy import leases
from cache.regions import valuable
from tests.simulation.clock import clock
from tests.simulation.loop import NOBODY, PROCESS, settle

REDIS_URL = "redis://redis:6379"
_EPOCH_MS = 1_800_000_000_000


class Redis:
    """The server. `up`, `hangs`, `slow`, `loss`, `damage`, `lies`, `limit` and `cut_off` are its current faults."""

    def __init__(self, loop, random, trace):
        self.loop = loop
        self.random = random
        self.trace = trace
        self.data = OrderedDict()
        self.expires = {}
        # Whether it ever had a fault, and when it last lost all data.
        self.harmed = False
        self.emptied_ns = 0
        self.up = True
        self.hangs = False
        self.slow = 1.0
        # Share of round trips that fail, and share of values that are returned damaged.
        self.loss = self.damage = 0.0
        self.lies = 0.0
        # Capacity in bytes (0: unlimited). When full, it evicts the oldest value, or refuses the write ("noeviction").
        self.limit = 0
        self.evicts = True
        self.evicted = 0
        # Names of processes that cannot reach it.
        self.cut_off = set()
        self.generation = 0

    def client(self, settings):
        """Returns a client for the current process; replaces redis_client.one_server."""
        return Client(self, PROCESS.get(), settings.get("socket_timeout"))

    def restart(self, *, empty):
        self.generation += 1
        if empty:
            self.emptied_ns = clock.ns()
            self.data.clear()
            self.expires.clear()

    def now_ms(self):
        return _EPOCH_MS + clock.ns() // 1_000_000

    def run(self, command, arguments):
        """Runs one command on the server."""
        return getattr(self, f"_{command}")(*arguments)

    def _find(self, key):
        expires = self.expires.get(key)
        if expires is not None and expires <= self.now_ms():
            del self.expires[key], self.data[key]
        return self.data.get(key)

    def _store(self, key, value, px=None):
        self.data.pop(key, None)
        self.expires.pop(key, None)
        self.data[key] = value
        if px is not None:
            self.expires[key] = self.now_ms() + int(px)

    def _size(self):
        return sum(len(value) for value in self.data.values() if isinstance(value, bytes))

    def _ping(self):
        return True

    def _info(self, _):
        return {"evicted_keys": self.evicted}

    def _get(self, key):
        return self._damaged(self._find(_key(key)))

    def _mget(self, keys):
        return [self._get(key) for key in keys]

    def answer(self, command, *arguments):
        """Like `run`, with the arguments and the reply in the Redis protocol."""
        if command == b"SET":
            key, value, _, px = arguments
            arguments = (key, value, px)
        return _encoded(self.run(command.decode().lower(), arguments))

    def _damaged(self, value):
        random = self.random
        if not isinstance(value, bytes) or not self.damage or random.random() >= self.damage:
            return value
        way = random.randrange(6)
        if way == 0:
            return value[: random.randrange(len(value) + 1)]
        if way == 1:
            return random.randbytes(len(value))
        if way == 2:
            frames = [each for each in self.data.values() if isinstance(each, bytes)]
            return random.choice(frames)
        if way == 3:
            return [value]
        if way == 4:
            return value.hex()
        at = random.randrange(len(value))
        return value[:at] + bytes((value[at] ^ (1 << random.randrange(8)),)) + value[at + 1 :]

    def _set(self, key, value, px=None):
        if self.limit:
            if not self.evicts and self._size() + len(value) > self.limit:
                return ResponseError("OOM command not allowed when used memory > 'maxmemory'.")
            self._store(_key(key), _value(value), px)
            while self._size() > self.limit:
                oldest = next(key for key, value in self.data.items() if isinstance(value, bytes))
                del self.data[oldest]
                self.expires.pop(oldest, None)
                self.evicted += 1
            return True
        self._store(_key(key), _value(value), px)
        return True

    def _incr(self, key):
        number = int(self._find(_key(key)) or 0) + 1
        self._store(_key(key), b"%d" % number)
        return number

    def _unlink(self, *keys):
        for key in keys:
            self.expires.pop(_key(key), None)
            self.data.pop(_key(key), None)
        return len(keys)

    _delete = _unlink

    def _sadd(self, key, *members):
        self.data.setdefault(_key(key), set()).update(_value(member) for member in members)
        return 1

    def _srem(self, key, *members):
        self.data.get(_key(key), set()).difference_update(_value(member) for member in members)
        return 1

    def _smembers(self, key):
        members = set(self.data.get(_key(key), ()))
        if self.lies and self.random.random() < self.lies:
            if self.random.random() < 0.5:
                return b"WRONGTYPE"
            members.add(b"\xff\xfe:\x00")
        return members

    def _hdel(self, key, *fields):
        found = self.data.get(_key(key), {})
        for field in fields:
            found.pop(_value(field), None)
        return 1

    def _zrevrange(self, key, *_):
        return []

    def _eval(self, script, keys, *arguments):
        return _SCRIPTS[script](self, [_key(key) for key in arguments[:keys]], [_value(a) for a in arguments[keys:]])

    def beat(self, keys, arguments):
        epochs, members = (self.data.setdefault(key, {}) for key in keys)
        version = epochs.get(b"version", b"0")
        members[arguments[0]] = arguments[1] + b" %d" % self.now_ms()
        if version == arguments[1]:
            return [version]
        return [version, *(part for pair in epochs.items() for part in pair)]

    def purge(self, keys, arguments):
        scopes = arguments[2:]
        epochs = self.data.setdefault(keys[0], {})
        epoch = max(self.now_ms(), int(epochs.get(b"version", 0)) + 1, int(arguments[0]))
        if b"all" in scopes:
            epochs.clear()
        added = sum(scope not in epochs for scope in scopes)
        if added and len(epochs) + added > int(arguments[1]):
            return b"full"
        for scope in (*scopes, b"version"):
            epochs[scope] = b"%d" % epoch
        return b"%d" % epoch

    def merge(self, keys, arguments):
        epochs = self.data.setdefault(keys[0], {})
        version = epochs.get(b"version", b"0")
        for scope, epoch in zip(arguments[::2], arguments[1::2], strict=True):
            if int(epoch) > int(epochs.get(scope, 0)):
                epochs[scope] = epoch
                version = max(version, epoch, key=int)
        epochs[b"version"] = version
        return version

    def members(self, keys, arguments):
        members = self.data.setdefault(keys[1], {})
        now = self.now_ms()
        for member, said in list(members.items()):
            if now - int(said.split()[1]) > int(arguments[0]):
                del members[member]
        return [b"%d" % now, *(part for pair in members.items() for part in pair)]

    def take(self, keys, arguments):
        if self._find(keys[0]) is not None:
            return b""
        token = b"%d" % (self.now_ms() * 1000 + clock.ns() // 1000 % 1000)
        self._store(keys[0], token, arguments[0])
        return token

    def fill(self, keys, arguments):
        if self._find(keys[0]) != arguments[0]:
            return 0
        self._store(keys[1], arguments[1], arguments[2])
        self._unlink(keys[0])
        return 1

    def release(self, keys, arguments):
        if self._find(keys[0]) == arguments[0]:
            self._unlink(keys[0])

    def tell(self, keys, arguments):
        return None


_SCRIPTS = {
    purge_board._BEAT: Redis.beat,
    purge_board._PURGE: Redis.purge,
    purge_board._MERGE: Redis.merge,
    purge_board._MEMBERS_NOW: Redis.members,
    leases._TAKE: Redis.take,
    leases._FILL: Redis.fill,
    leases._RELEASE: Redis.release,
    valuable._REPORT: Redis.tell,
}


def _key(key):
    return key if isinstance(key, bytes) else key.encode()


def _value(value):
    return value if isinstance(value, bytes) else str(value).encode()


def _encoded(reply):
    """Encodes a reply in the Redis protocol."""
    if reply is None:
        return b"_\r\n"
    if reply is True:
        return b"+OK\r\n"
    if isinstance(reply, ResponseError):
        return b"-%b\r\n" % str(reply).encode()
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(_encoded, reply))
    if isinstance(reply, str):
        return b"+%b\r\n" % reply.encode()
    return b"$%d\r\n%b\r\n" % (len(reply), reply)


class Connection:
    """Replaces redis-py's connection, as far as lent_connection needs it; it is also its own writer and transport."""

    def __init__(self, client):
        self._client = client
        self._writer = self.transport = self
        self._protocol = None
        self._commands = Reader()
        self._is_open = True
        # Last arrival time in each direction, which keeps the data in order.
        self._arrives_ns = {True: 0, False: 0}

    async def connect(self):
        await self._client.trip([("ping", ())])
        self._generation = self._client.server.generation

    async def disconnect(self, *, nowait):
        self.abort()

    def set_protocol(self, protocol):
        self._protocol = protocol

    def abort(self):
        self._is_open = False

    def write(self, data):
        if self._is_open:
            self._client.server.loop.call_at_ns(self._arrival_ns(there=True), self._arrived, data, context=NOBODY)

    def writelines(self, parts):
        self.write(b"".join(parts))

    def _arrival_ns(self, *, there):
        arrives = max(self._arrives_ns[there] + 1, clock.ns() + self._client.delay_ns())
        self._arrives_ns[there] = arrives
        return arrives

    def _arrived(self, data):
        """Handles data that arrived at the server."""
        server, process = self._client.server, self._client.process
        if not process.alive or self._commands is None:
            return
        if server.hangs or process.name in server.cut_off:
            self._commands = None  # no reply ever comes, neither to this nor to later commands
            return
        lost_before = server.loss and server.random.random() < server.loss
        if not server.up or server.generation != self._generation or (lost_before and server.random.random() < 0.5):
            self._end()
            return
        self._commands.feed(data)
        replies = []
        while (command := self._commands.gets()) is not False:
            replies.append(server.answer(*command))
        if lost_before:
            self._end()
        else:
            process.call_at(self._arrival_ns(there=False), self._answered, b"".join(replies))

    def _answered(self, data):
        if self._is_open:
            self._protocol.data_received(data)

    def _end(self):
        self._commands = None
        self._client.process.call_at(self._arrival_ns(there=False), self._ended)

    def _ended(self):
        if self._is_open:
            self._is_open = False
            self._protocol.connection_lost(RedisConnectionError("connection lost"))


class Client:
    """Replaces redis.asyncio.Redis in one process; it is also its own connection pool.

    `seconds` is how long it waits for a reply (redis-py's `socket_timeout`); None: for ever.
    """

    def __init__(self, server, process, seconds):
        self.server = server
        self.process = process
        self.seconds = seconds
        self.connection_pool = self

    def make_connection(self):
        """Like ConnectionPool.make_connection."""
        return Connection(self)

    async def disconnect(self, **_):
        """Like ConnectionPool.disconnect; does nothing."""

    async def aclose(self):
        """Does nothing."""

    def __getattr__(self, command):
        """Any command, with the arguments that redis-py takes."""
        return lambda *arguments, **_: self._run([(command, arguments)])

    def execute_command(self, command, *arguments):
        return self._run([(command.lower(), arguments)])

    def pipeline(self, transaction=False):
        return _Pipeline(self)

    async def _run(self, commands):
        (reply,) = await self.trip(commands)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def trip(self, commands):
        """Makes a round trip to the server. Raises redis-py's errors."""
        server = self.server
        random, loop = server.random, server.loop
        replies = loop.create_future()
        state = server.generation

        def at_the_server():
            if not self.process.alive:
                return
            if server.hangs or self.process.name in server.cut_off:
                return  # no reply ever comes
            if not server.up or server.generation != state:
                back(RedisConnectionError("connection refused"))
                return
            lost_before = server.loss and random.random() < server.loss
            if lost_before and random.random() < 0.5:
                back(RedisConnectionError("connection lost"))
                return
            made = [server.run(command, arguments) for command, arguments in commands]
            back(RedisConnectionError("connection lost") if lost_before else made)

        def back(made):
            self.process.call_at(clock.ns() + self.delay_ns(), settle, replies, made)

        loop.call_at_ns(clock.ns() + self.delay_ns(), at_the_server, context=NOBODY)
        try:
            async with asyncio.timeout(self.seconds):
                return await replies
        except TimeoutError:
            raise RedisTimeoutError("no reply in time") from None

    def delay_ns(self):
        return int(self.server.random.randint(30_000, 200_000) * self.server.slow)


class _Pipeline:
    def __init__(self, client):
        self._client = client
        self._commands = []

    def __len__(self):
        return len(self._commands)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    def __getattr__(self, command):
        """Adds any command."""
        return lambda *arguments, **more: self._commands.append((command, (*arguments, *more.values())))

    async def execute(self, raise_on_error=True):
        replies = await self._client.trip(self._commands)
        for reply in replies:
            if raise_on_error and isinstance(reply, Exception):
                raise reply
        return replies
