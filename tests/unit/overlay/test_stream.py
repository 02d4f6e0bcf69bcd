from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.overlay import stream as stream_module
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.relay import Relay
from deskgrid.overlay.stream import MAX_FRAME_BYTES, Stream, Unframer, receive_record, secure, send_record

from .certificates import Authority, Leaf
from .loopback import eventually, nothing_left, raise_fd_limit, receive, reset, tcp_pair, write_until_full

NAME = "attempt-1.job-1.deskgrid"
END, RESET = b"\0\0\0\0", b"\xff\xff\xff\xff"


@functools.cache
def leaf() -> Leaf:
    return Authority().issue(NAME)


@pytest.fixture(params=[False, True], ids=["epoll", "portable"])
async def pumps(request: pytest.FixtureRequest) -> AsyncIterator[Pumps]:
    async with nothing_left(portable=request.param) as made:
        yield made


async def tls_pair(pumps: Pumps, buffer_bytes: int = 0) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    near, far = tcp_pair(buffer_bytes)
    async with asyncio.TaskGroup() as tasks:
        client = tasks.create_task(secure(pumps, near, leaf().client_context, server_hostname=NAME))
        server = tasks.create_task(secure(pumps, far, leaf().server_context, server_side=True))
    return client.result(), server.result()


class Link:
    """A program, two streams, a program: `a` and `b` are the programs' ends."""

    def __init__(self, pumps: Pumps, tls: tuple[ssl.SSLSocket, ssl.SSLSocket], buffer_bytes: int = 0) -> None:
        self.a, local_a = tcp_pair(buffer_bytes)
        self.b, local_b = tcp_pair(buffer_bytes)
        self.stream_a = Stream(pumps, tls[0], local_a)
        self.stream_b = Stream(pumps, tls[1], local_b)

    async def reasons(self) -> tuple[str, str]:
        async with asyncio.timeout(10):
            return await self.stream_a.wait_closed(), await self.stream_b.wait_closed()

    def close(self) -> None:
        self.a.close()
        self.b.close()


@contextlib.asynccontextmanager
async def linked(pumps: Pumps, buffer_bytes: int = 0) -> AsyncIterator[Link]:
    link = Link(pumps, await tls_pair(pumps, buffer_bytes), buffer_bytes)
    try:
        yield link
    finally:
        link.close()
        link.stream_a.abort()
        link.stream_b.abort()


class Peer:
    """A stream whose other end speaks TLS by hand."""

    def __init__(self, tls: ssl.SSLSocket, program: socket.socket, stream: Stream) -> None:
        self.tls, self.program, self.stream = tls, program, stream

    def send(self, data: bytes) -> None:
        self.tls.setblocking(True)
        self.tls.sendall(data)

    async def reason(self) -> str:
        async with asyncio.timeout(10):
            return await self.stream.wait_closed()


@contextlib.asynccontextmanager
async def by_hand(pumps: Pumps) -> AsyncIterator[Peer]:
    tls, theirs = await tls_pair(pumps)
    program, local = tcp_pair()
    stream = Stream(pumps, theirs, local)
    try:
        yield Peer(tls, program, stream)
    finally:
        stream.abort()
        tls.close()
        program.close()


class TestFrames:
    @given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.lists(st.integers(1, 50), min_size=1), st.booleans())
    def test_payload_comes_out_whatever_the_cuts(self, frames: list[bytes], cuts: list[int], ended: bool) -> None:
        wire = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames) + (END if ended else b"")
        reader, got, at, turn = Unframer(), b"", 0, 0
        while at < len(wire):
            size = cuts[turn % len(cuts)]
            got += b"".join(reader.feed(memoryview(wire[at : at + size])))
            at, turn = at + size, turn + 1
        assert got == b"".join(frames)
        assert (reader.ended, reader.reset, reader.wrong) == (ended, False, "")

    @given(st.binary(max_size=200))
    def test_any_bytes_are_payload_or_refused_for_ever(self, data: bytes) -> None:
        reader = Unframer()
        assert sum(map(len, reader.feed(memoryview(data)))) <= len(data)
        if reader.wrong or reader.reset:
            assert reader.feed(memoryview(b"\0\0\0\1x")) == []

    def test_data_after_the_end_is_wrong_and_a_reset_is_not(self) -> None:
        after_end, reset_after_end = Unframer(), Unframer()
        after_end.feed(memoryview(END + b"\0\0\0\1x"))
        reset_after_end.feed(memoryview(END + RESET))
        assert after_end.wrong
        assert reset_after_end.reset and not reset_after_end.wrong

    def test_frame_above_the_bound_is_wrong(self) -> None:
        reader = Unframer()
        reader.feed(memoryview((MAX_FRAME_BYTES + 1).to_bytes(4, "big")))
        assert reader.wrong


class TestBytes:
    @pytest.mark.parametrize("seed", range(3))
    async def test_bytes_arrive_unchanged_both_ways_at_once(self, pumps: Pumps, seed: int) -> None:
        rng = random.Random(seed)
        there, back = rng.randbytes(5_000_000 + seed), rng.randbytes(3_000_000 + 17 * seed)

        async def send(sock: socket.socket, data: bytes) -> None:
            at = 0
            while at < len(data):
                size = rng.choice([1, 3, 4, 5, 1000, 16384, 262140, 262144, 900_000])
                await asyncio.get_running_loop().sock_sendall(sock, data[at : at + size])
                at += size
            sock.shutdown(socket.SHUT_WR)

        async with linked(pumps) as link:
            got_b, got_a, *_ = await asyncio.gather(receive(link.b), receive(link.a), send(link.a, there), send(link.b, back))
            assert got_b == there
            assert got_a == back
            assert await link.reasons() == ("finished", "finished")
            assert (link.stream_a.sent_bytes, link.stream_a.received_bytes) == (len(there), len(back))
            assert (link.stream_b.sent_bytes, link.stream_b.received_bytes) == (len(back), len(there))

    async def test_many_tiny_messages_to_a_slow_reader_arrive(self, pumps: Pumps) -> None:
        async with linked(pumps, 4096) as link:
            data = random.Random(1).randbytes(30_000)

            async def drip() -> None:
                for at in range(0, len(data), 3):
                    await asyncio.get_running_loop().sock_sendall(link.a, data[at : at + 3])
                link.a.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(drip())
            await eventually(lambda: link.stream_a.sent_bytes > 2000)
            assert await receive(link.b) == data
            await sending
            link.b.close()
            assert await link.reasons() == ("finished", "finished")

    async def test_bytes_that_came_with_the_last_record_are_not_lost(self, pumps: Pumps) -> None:
        tls, theirs = await tls_pair(pumps)
        tls.setblocking(True)
        tls.sendall(b"\0\0\0\5hello" + b"\0\0\0\3abc" + END)
        assert await receive_record(pumps, theirs, limit_s=5) == b"hello"
        program, local = tcp_pair()
        stream = Stream(pumps, theirs, local)
        assert await receive(program) == b"abc"
        stream.abort()
        await stream.wait_closed()
        tls.close()
        program.close()

    async def test_round_trip_time_is_told(self, pumps: Pumps) -> None:
        async with linked(pumps) as link:
            link.a.sendall(b"x")
            assert await receive(link.b, 1) == b"x"
            rtt_s = link.stream_a.rtt_s()
            assert rtt_s is not None and 0 < rtt_s < 1


class TestEnds:
    async def test_half_close_passes_and_the_other_direction_lives_on(self, pumps: Pumps) -> None:
        for first in ("a", "b"):
            async with linked(pumps) as link:
                near, far = (link.a, link.b) if first == "a" else (link.b, link.a)
                near.sendall(b"question")
                near.shutdown(socket.SHUT_WR)
                assert await receive(far) == b"question"
                far.sendall(b"answer")
                assert await receive(near, 6) == b"answer"
                far.close()
                assert await receive(near) == b""
                assert await link.reasons() == ("finished", "finished")

    async def test_reset_passes(self, pumps: Pumps) -> None:
        for first in ("a", "b"):
            async with linked(pumps) as link:
                near, far = (link.a, link.b) if first == "a" else (link.b, link.a)
                near.sendall(b"x")
                assert await receive(far, 1) == b"x"
                reset(near)
                with pytest.raises(ConnectionResetError):
                    await receive(far)
                assert sorted(await link.reasons()) == ["reset by the peer", "the local program reset its connection"]

    async def test_reset_after_half_close_passes(self, pumps: Pumps, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "_CHECK_S", 0.05)  # without epoll it is found out now and then
        async with linked(pumps) as link:
            link.b.shutdown(socket.SHUT_WR)
            assert await receive(link.a) == b""
            reset(link.b)
            assert "finished" not in await link.reasons()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                link.a.send(b"to nobody")

    async def test_program_that_closes_and_is_sent_more_resets_the_sender(self, pumps: Pumps) -> None:
        async with linked(pumps) as link:
            link.b.close()
            assert await receive(link.a) == b""
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                while True:
                    await asyncio.get_running_loop().sock_sendall(link.a, bytes(1000))
                    await asyncio.sleep(0.001)
            assert "finished" not in await link.reasons()

    async def test_program_that_died_while_nothing_could_be_read_from_it_is_noticed(self) -> None:
        async with nothing_left() as pumps, linked(pumps, 8192) as link:
            await write_until_full(link.a)  # b does not read
            reset(link.a)
            assert await link.reasons() != ("finished", "finished")
            with pytest.raises(ConnectionResetError):
                await receive(link.b)

    async def test_cut_connection_is_a_reset_not_an_end(self, pumps: Pumps) -> None:
        for cut in ("tcp end", "tls end", "in a frame"):
            async with by_hand(pumps) as peer:
                peer.send(b"\0\0\0\5hello" + (b"\0\0\0\5wor" if cut == "in a frame" else b""))
                assert await receive(peer.program, 5) == b"hello"
                if cut == "tls end":
                    with contextlib.suppress(OSError):
                        peer.tls.settimeout(0.01)
                        peer.tls.unwrap()
                peer.tls.shutdown(socket.SHUT_RDWR)
                with pytest.raises(ConnectionResetError):
                    await receive(peer.program)
                assert "cut" in await peer.reason()

    async def test_end_of_data_then_cut_is_a_reset_for_what_was_still_being_sent(self, pumps: Pumps) -> None:
        async with by_hand(pumps) as peer:
            peer.send(END)
            assert await receive(peer.program) == b""
            peer.tls.shutdown(socket.SHUT_RDWR)
            assert "cut" in await peer.reason()

    @pytest.mark.parametrize(
        "garbage",
        [b"GET / HTTP/1.1\r\n\r\n", (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"\xff\xff\xff\xfe", END + b"\0\0\0\1x", END + END],
    )
    async def test_garbage_instead_of_frames_is_a_reset(self, pumps: Pumps, garbage: bytes) -> None:
        async with by_hand(pumps) as peer:
            peer.send(garbage)
            assert "broken" in await peer.reason()
            with pytest.raises(ConnectionResetError):
                await receive(peer.program)
                peer.program.send(b"x")
                await receive(peer.program)

    async def test_garbage_instead_of_tls_is_a_reset(self, pumps: Pumps) -> None:
        async with by_hand(pumps) as peer:
            os.write(peer.tls.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            assert "TLS" in await peer.reason()
            with pytest.raises(ConnectionResetError):
                await receive(peer.program)

    async def test_abort_resets_both_programs(self, pumps: Pumps) -> None:
        async with linked(pumps) as link:
            link.stream_a.abort("no longer wanted")
            link.stream_a.abort("twice")
            for program in (link.a, link.b):
                with pytest.raises(ConnectionResetError):
                    await receive(program)
            assert (await link.reasons())[0] == "no longer wanted"

    async def test_any_number_may_wait_and_one_may_give_up(self, pumps: Pumps) -> None:
        async with linked(pumps) as link:
            waiters = [asyncio.create_task(link.stream_a.wait_closed()) for _ in range(5)]
            await asyncio.sleep(0)
            waiters[0].cancel()
            link.stream_a.abort("enough")
            assert (await asyncio.gather(*waiters, return_exceptions=True))[1:] == ["enough"] * 4

    async def test_all_bytes_are_delivered_when_both_end_at_once(self, pumps: Pumps) -> None:
        data = bytes(2_000_000)
        for _ in range(5):
            async with linked(pumps) as link:

                async def finish(sock: socket.socket) -> bytes:
                    got = asyncio.create_task(receive(sock))
                    await asyncio.get_running_loop().sock_sendall(sock, data)
                    sock.shutdown(socket.SHUT_WR)
                    return await got

                assert await asyncio.gather(finish(link.a), finish(link.b)) == [data, data]
                assert await link.reasons() == ("finished", "finished")

    async def test_reader_that_was_suspended_gets_everything_after_the_sender_has_gone(
        self, pumps: Pumps, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "_FAREWELL_S", 0.02)
        async with linked(pumps, 8192) as link:
            link.b.shutdown(socket.SHUT_WR)
            taken = await write_until_full(link.a)
            link.a.close()
            assert len(await receive(link.b)) == taken
            assert await link.reasons() == ("finished", "finished")

    async def test_sender_waits_for_a_peer_that_reads_late(self, pumps: Pumps, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "_FAREWELL_S", 0.02)
        tls, theirs = await tls_pair(pumps, 8192)
        program, local = tcp_pair()
        stream = Stream(pumps, theirs, local)
        tls.setblocking(True)
        tls.sendall(END)
        data = random.Random(3).randbytes(100_000)
        await asyncio.get_running_loop().sock_sendall(program, data)
        program.close()
        await asyncio.sleep(0.2)  # ten times as long as a peer that has everything is waited for
        reader, got = Unframer(), bytearray()
        while not reader.ended:
            got += b"".join(reader.feed(memoryview(tls.recv(16384))))
        assert got == data
        tls.close()
        assert await stream.wait_closed() == "finished"


class TestAnything:
    @pytest.mark.parametrize("seed", range(20))
    async def test_what_arrives_is_what_was_sent_and_all_of_it_unless_reset(self, pumps: Pumps, seed: int) -> None:
        rng = random.Random(seed)
        async with linked(pumps, rng.choice([0, 8192])) as link:
            sent, got = {link.a: bytearray(), link.b: bytearray()}, {link.a: bytearray(), link.b: bytearray()}
            was_reset = False

            async def send(sock: socket.socket) -> None:
                nonlocal was_reset
                for _ in range(rng.randrange(20)):
                    data = rng.randbytes(rng.choice([1, 5, 1000, 70_000, 300_000]))
                    sent[sock] += data
                    await asyncio.get_running_loop().sock_sendall(sock, data)
                if rng.random() < 0.3:
                    was_reset = True
                    reset(sock)
                else:
                    sock.shutdown(socket.SHUT_WR)

            async def take(sock: socket.socket) -> None:
                while data := await asyncio.get_running_loop().sock_recv(sock, rng.choice([1, 1000, 100_000, 1 << 20])):
                    got[sock] += data

            ends = [asyncio.create_task(act(sock)) for sock in (link.a, link.b) for act in (send, take)]
            reasons = await link.reasons()
            for end in ends:
                if was_reset:
                    end.cancel()
            await asyncio.gather(*ends, return_exceptions=was_reset)
            assert sent[link.a].startswith(got[link.b])
            assert sent[link.b].startswith(got[link.a])
            if reasons == ("finished", "finished") and not was_reset:
                assert (got[link.b], got[link.a]) == (sent[link.a], sent[link.b])
            assert was_reset or reasons == ("finished", "finished")


class TestMemory:
    async def test_slow_reader_stops_the_sender(self, pumps: Pumps) -> None:
        async with linked(pumps, 32 << 10) as link:
            taken = await write_until_full(link.a)
            assert taken < 3_000_000  # two buffers of ours, and what the system holds on three connections
            assert link.stream_b.received_bytes <= taken
            link.a.shutdown(socket.SHUT_WR)
            assert len(await receive(link.b)) == taken

    async def test_thousand_idle_streams_cost_little_and_all_live(self) -> None:
        count = min(1000, (raise_fd_limit(8192) - 200) // 6)
        async with nothing_left() as pumps:
            before = _memory_bytes()
            links = [Link(pumps, await tls_pair(pumps)) for _ in range(count)]
            each = (_memory_bytes() - before) / count
            for link in links:
                link.a.send(b"x")
            for link in links:
                assert await receive(link.b, 1) == b"x"
            pumps.close()
            for link in links:
                assert "closed" in await link.reasons()
                link.close()
            assert each < 200_000  # two streams, of which OpenSSL has most


class TestClosing:
    async def test_close_of_the_pumps_resets_what_is_carried(self) -> None:
        async with nothing_left() as pumps, linked(pumps) as link:
            pumps.close()
            pumps.close()
            assert "closed" in await link.reasons()  # one end may have learnt it from the other
            with pytest.raises(ConnectionResetError):
                await receive(link.a)

    async def test_stream_on_closed_pumps_ends_at_once(self) -> None:
        async with nothing_left() as pumps:
            tls, theirs = await tls_pair(pumps)
            pumps.close()
            program, local = tcp_pair()
            assert await Stream(pumps, tls, local).wait_closed() == "closed"
            program.close()
            theirs.close()


def _memory_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_records_pass_before_the_stream(pumps: Pumps) -> None:
    tls, theirs = await tls_pair(pumps)
    for size in (0, 1, 16384):
        await send_record(pumps, tls, bytes(size), limit_s=5)
        assert await receive_record(pumps, theirs, limit_s=5) == bytes(size)
    tls.close()
    theirs.close()


async def test_a_stream_that_has_closed_its_program_lets_go_of_the_file_number() -> None:
    """The number may be another socket's, of the same thread, before the peer has closed, too."""
    async with nothing_left(threads=1) as pumps, by_hand(pumps) as peer:
        number = peer.stream._local.fileno()
        peer.program.shutdown(socket.SHUT_WR)
        peer.send(END)
        await eventually(lambda: peer.stream._local.fileno() == -1)
        others = [tcp_pair()]
        while number not in (near.fileno() for near, _ in others):
            others.append(tcp_pair())
        near, far = next(both for both in others if both[0].fileno() == number)
        program, local = tcp_pair()
        relay = Relay(pumps, near, local)
        await eventually(lambda: len(pumps) == 2)
        peer.tls.close()
        assert await peer.reason() == "finished"
        far.send(b"still heard")
        assert await receive(program, 11) == b"still heard"
        relay.abort()
        await relay.wait_closed()
        for sock in (program, *(sock for both in others for sock in both)):
            sock.close()
