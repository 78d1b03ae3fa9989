"""The network between routers and workers: connections between simulated processes.

Data sent over a connection arrives in order, after a delay. While the way is dark (partitioned), data is held back. It
arrives when the way is light again, or never, as with TCP. A dead process sends nothing; the other end of its
connections notices its death, unless the way is dark.
"""

import asyncio
from asyncio import events

import grpc

from router.transport.grpc_channel import CONNECT_SECONDS, CallError, outcome
from services.runtime.driver import Driver
from services.runtime.rpc.rpc import Failure
from tests.simulation.clock import clock
from tests.simulation.loop import NOBODY, settle

_MS = 1_000_000


class Way:
    """The path between one router and one worker. `slow` multiplies its delays; `dark` means partitioned."""

    def __init__(self, network, name):
        self.network = network
        self.name = name
        self.slow = 1.0
        self.dark = False
        self.held = []
        self.connections = []

    def delay_ns(self):
        random = self.network.random
        ns = random.randint(50_000, 300_000)
        if random.random() < 0.02:
            ns += random.randint(0, 3 * _MS)
        return int(ns * self.slow)

    def deliver(self, sender, connection, function, *args):
        """Calls `function` at the other end of `connection`, after a delay and in order, unless `sender` is dead."""
        if not sender.alive:
            return
        at_ns = max(clock.ns() + self.delay_ns(), connection.last_ns)
        connection.last_ns = at_ns
        self.network.loop.call_at_ns(at_ns, self._arrive, connection, function, args, context=NOBODY)

    def _arrive(self, connection, function, args):
        if self.dark:
            self.held.append((connection, function, args))
        elif connection.open:
            function(*args)

    def light(self):
        self.dark = False
        held, self.held = self.held, []
        for connection, function, args in held:
            self._arrive(connection, function, args)

    def cut(self):
        """Ends all connections on this path."""
        for connection in list(self.connections):
            connection.reset()


class Network:
    """The network; `servers` are by address."""

    def __init__(self, loop, random, trace):
        self.loop = loop
        self.random = random
        self.trace = trace
        self.servers = {}
        self.ways = {}

    def way(self, router, address):
        """Returns the path between a router and a worker."""
        found = self.ways.get((router, address))
        if found is None:
            found = self.ways[router, address] = Way(self, f"{router}>{address}")
        return found


class _Connection:
    """Both ends of a connection: `client` is a process, `server` a Server, and `calls` are in flight."""

    def __init__(self, way, client, server):
        self.way = way
        self.client, self.server = client, server
        self.open = True
        self.last_ns = 0
        self.calls = {}
        self.lost = None
        way.connections.append(self)
        client.died.append(self._end_gone)
        server.process.died.append(self._end_gone)

    def _end_gone(self):
        if self.open:
            if self.way.dark:
                self.way.held.append((self, self.reset, ()))
            else:
                loop = self.way.network.loop
                loop.call_at_ns(clock.ns() + self.way.delay_ns(), self.reset, context=NOBODY)

    def reset(self):
        """Ends the connection at both ends."""
        if not self.open:
            return
        self.open = False
        self.way.connections.remove(self)
        tasks = [call.task for call in self.calls.values() if call.task is not None]
        if self.client.alive:
            self.client.call(self.lost, self)
        if self.server.process.alive:
            for task in tasks:
                self.server.process.call(task.cancel)


class _Call:
    __slots__ = ("connection", "done", "method", "number", "request", "task")

    def __init__(self, number, method, request, done):
        self.number = number
        self.method = method
        self.request = request
        self.done = done
        self.connection = None
        self.task = None


class SimChannel:
    """Replaces GrpcChannel."""

    def __init__(self, network, process, address):
        self._network = network
        self._process = process
        self._address = address
        self._way = network.way(process.name, address)
        self._connection = None
        self._connecting = None
        self._number = 0

    def begin(self, method, request, done):
        self._number += 1
        call = _Call(self._number, method, request, done)
        connection = self._connection
        if connection is not None and connection.open:
            self._send(connection, call)
        else:
            call.task = asyncio.get_running_loop().create_task(self._connect_first(call))
        return lambda: self._cancel(call)

    async def call(self, method, request):
        return await outcome(lambda done: self.begin(method, request, done))

    def is_local(self, port):
        return self._connection is not None and self._network.servers[self._address].port == port

    async def ping(self, seconds):
        """Pings the engine, which answers unless the whole process is stopped."""
        try:
            async with asyncio.timeout(seconds):
                connection = await self._connect() if self._connection is None else self._connection
                answered = asyncio.get_running_loop().create_future()
                self._way.deliver(self._process, connection, self._pinged, connection, answered)
                await answered
        except (TimeoutError, CallError):
            return False
        return True

    def _pinged(self, connection, answered):
        process = connection.server.process
        if process.stopped:
            process.frozen.append(events.Handle(self._pinged, (connection, answered), self._network.loop, NOBODY))
        elif process.alive:
            self._way.deliver(process, connection, self._process.call, settle, answered, None)

    def drop(self):
        if self._connection is not None:
            self._connection.reset()

    async def _connect_first(self, call):
        try:
            connection = await self._connect()
        except CallError as error:
            call.done(error)
            return
        call.task = None
        self._send(connection, call)

    async def _connect(self):
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connected())
            # All that wait for it may have left before it fails.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._connecting)

    async def _connected(self):
        try:
            way = self._way
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.sleep(2 * way.delay_ns() / 1e9)
                while way.dark:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            message = f"no connection to {self._address} within {CONNECT_SECONDS:g} s"
            raise CallError(grpc.StatusCode.UNAVAILABLE, message) from None
        finally:
            self._connecting = None
        server = self._network.servers.get(self._address)
        if server is None or not server.process.alive:
            raise CallError(grpc.StatusCode.UNAVAILABLE, f"cannot connect to {self._address}: refused")
        connection = self._connection = _Connection(way, self._process, server)
        connection.lost = self._lost
        return connection

    def _lost(self, connection):
        if self._connection is connection:
            self._connection = None
        calls, connection.calls = connection.calls, {}
        for call in calls.values():
            call.done(CallError(grpc.StatusCode.UNAVAILABLE, "the connection ended", lost=True))

    def _send(self, connection, call):
        call.connection = connection
        connection.calls[call.number] = call
        self._way.deliver(self._process, connection, self._arrive, connection, call)

    def _arrive(self, connection, call):
        connection.server.process.call(connection.server.receive, call, lambda answer: self._answer(call, answer))

    def _answer(self, call, answer):
        """Sends the server's answer back; runs on the server."""
        call.task = None
        connection = call.connection
        self._way.deliver(connection.server.process, connection, self._return, call, answer)

    def _return(self, call, answer):
        self._process.call(self._ended, call, answer)

    def _ended(self, call, answer):
        if call.connection.calls.pop(call.number, None) is not None:
            call.done(answer)

    def _cancel(self, call):
        connection = call.connection
        if connection is None:
            if call.task is not None:
                call.task.cancel()
        elif connection.calls.pop(call.number, None) is not None and connection.open:
            self._way.deliver(self._process, connection, self._cancelled, connection, call)

    def _cancelled(self, connection, call):
        connection.server.process.call(_cancel_task, call)


def _cancel_task(call):
    if call.task is not None:
        call.task.cancel()


class Server:
    """A worker's engine: `fast_path` answers Execute, `handlers` the other methods by path. `lie` may alter answers."""

    def __init__(self, process, port, execute, fast_path, handlers, lie):
        self.process = process
        self.port = port
        self._execute = execute
        self._fast_path = fast_path
        self._handlers = handlers
        self._lie = lie

    def receive(self, call, answer):
        """Handles a call, on the process's event loop."""
        if call.method == self._execute:
            path = self._fast_path(call.request, (), None)
            call.task = Driver(path, lambda reply: self._reply(call, reply, answer))
            call.task.start()
        else:
            call.task = asyncio.get_running_loop().create_task(self._handle(call, answer))

    async def _handle(self, call, answer):
        handler = self._handlers.get(call.method)
        if handler is None:
            answer(CallError(grpc.StatusCode.UNIMPLEMENTED, "no such method"))
            return
        context = Context()
        try:
            body = await handler.unary_unary(call.request, context)
        except AbortError as aborted:
            answer(CallError(aborted.code, aborted.message))
        else:
            answer(self._lie(call.method, body))

    def _reply(self, call, reply, answer):
        if isinstance(reply, asyncio.CancelledError):
            return
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Failure):
            answer(CallError(reply.code, reply.message))
        else:
            answer(self._lie(call.method, bytes(reply.body)))


class AbortError(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


class Context:
    """The context of a call without metadata or deadline."""

    async def abort(self, code, message="", trailing=()):
        raise AbortError(code, message)

    def auth_context(self):
        return {}

    def invocation_metadata(self):
        return ()

    def time_remaining(self):
        return None

    def set_trailing_metadata(self, trailing):
        pass

    def code(self):
        return None
