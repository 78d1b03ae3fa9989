"""Batches on disk."""

import itertools
import time

import pytest
from blake3 import blake3
from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.ledger_spool import LedgerSpool, SpoolError
from tests.unit.clock import Clock


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def open_spool(folder):
    """Opens the folder; each time as a new life of the router."""
    opened = []

    def open_(max_bytes=1 << 20, clock=None):
        for spool in opened:
            spool.close()
        opened.append(LedgerSpool(folder, max_bytes, clock or Clock(1000)))
        opened[-1].open()
        return opened[-1]

    yield open_
    for spool in opened:
        spool.close()


def taken(spool):
    """All that waits, in order, each acknowledged."""
    found = []
    while (one := spool.first()) is not None:
        batch, digest = spool.read(one)
        assert blake3(batch).digest(16) == digest
        found.append((one.epoch, one.sequence, batch))
        spool.written(one)
    return found


def dropped(batch):
    told = ledger_pb2.Batch.FromString(batch)
    return told.dropped_records, told.dropped_requests


def test_batches_are_numbered_without_gaps_and_leave_in_order(open_spool):
    spool = open_spool()
    for number in range(3):
        spool.append(b"batch %d" % number, 1, 1)
    assert taken(spool) == [(1000, 1, b"batch 0"), (1000, 2, b"batch 1"), (1000, 3, b"batch 2")]
    spool.append(b"later", 1, 1)
    assert taken(spool) == [(1000, 4, b"later")]
    assert spool.bytes == 0


def test_what_a_life_leaves_the_next_sends_first_under_its_old_number(open_spool):
    spool = open_spool()
    for number in range(12):
        spool.append(b"old %d" % number, 1, 1)
    spool.written(spool.first())
    spool = open_spool(clock=Clock(2000))
    spool.append(b"new", 1, 1)
    assert [(epoch, sequence) for epoch, sequence, _ in taken(spool)] == [
        *((1000, number) for number in range(2, 13)),
        (2000, 1),
    ]


def test_an_epoch_is_later_than_any_before_though_the_clock_was_set_back(open_spool):
    assert open_spool(clock=Clock(5000)).epoch == 5000
    assert open_spool(clock=Clock(100)).epoch == 5001
    assert open_spool(clock=Clock(100)).epoch == 5002


def test_an_epoch_is_later_than_those_of_what_waits(open_spool, folder):
    spool = open_spool(clock=Clock(5000))
    spool.append(b"old", 1, 1)
    (folder / "epoch").unlink()
    assert open_spool(clock=Clock(100)).epoch == 5001


def test_two_processes_cannot_share_a_folder(open_spool, folder):
    open_spool()
    with pytest.raises(SpoolError, match="another process uses"):
        LedgerSpool(folder, 1, Clock(1000)).open()


def test_a_full_spool_gives_up_the_oldest_but_the_first_and_says_so(open_spool):
    whole = bytes(5000)
    spool = open_spool(max_bytes=60_000)
    for _ in range(10):
        spool.append(whole, 2, 20)
        assert spool.bytes <= 60_000 + 8192
    assert spool.dropped_requests > 0
    found = taken(spool)
    assert [sequence for _, sequence, _ in found] == list(range(1, 11))
    # The first may have been sent.
    assert found[0][2] == whole
    assert found[-1][2] == whole
    given_up = [dropped(batch) for _, _, batch in found if batch != whole]
    assert set(given_up) == {(2, 20)}
    assert sum(requests for _, requests in given_up) == spool.dropped_requests


def test_a_spool_that_is_full_of_small_batches_takes_no_more_and_says_so(open_spool, folder):
    spool = open_spool(max_bytes=5 * 4096)
    for number in range(50):
        spool.append(b"batch %d" % number, 1, 10)
    # One beyond the bound, for a batch may begin below it.
    assert len(list(folder.glob("*.batch"))) == 6
    assert spool.dropped_requests == 440
    sent = taken(spool)
    spool.append(b"after", 1, 1)
    sent += taken(spool)
    assert [sequence for _, sequence, _ in sent] == list(range(1, 9))
    assert [batch for _, _, batch in sent[:6]] == [b"batch %d" % number for number in range(6)]
    assert dropped(sent[6][2]) == (44, 440)
    assert sent[7][2] == b"after"


def test_what_cannot_be_given_up_on_a_full_disk_loses_nothing_else(open_spool, monkeypatch):
    spool = open_spool(max_bytes=20_000)
    spool.append(bytes(5000), 2, 20)
    spool.append(bytes(5000), 2, 20)
    write = spool._replace

    def replace(name, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        write(name, data)

    monkeypatch.setattr(spool, "_replace", replace)
    spool.append(bytes(5000), 2, 20)
    assert spool.dropped_requests == 0
    spool.append(bytes(5000), 3, 30)
    monkeypatch.undo()
    assert spool.dropped_requests == 30
    assert [batch for _, _, batch in taken(spool)] == [bytes(5000)] * 3
    spool.append(b"after", 1, 1)
    assert dropped(taken(spool)[0][2]) == (3, 30)


def test_a_batch_without_records_that_is_given_up_stays_on_disk_under_its_number(open_spool, folder):
    spool = open_spool()
    spool.append(b"uptime", 0, 0)
    spool.give_up(spool.first())
    assert [path.name for path in folder.glob("*.batch")] == ["1000-1-0-0.batch"]


def test_a_damaged_batch_is_sent_as_one_that_counts_what_was_in_it(open_spool, folder):
    spool = open_spool()
    spool.append(b"first", 1, 1)
    spool.append(b"second", 3, 33)
    (path,) = folder.glob("1000-2-*")
    path.write_bytes(path.read_bytes()[:-2])
    (_, _, first), (_, sequence, second) = taken(spool)
    assert first == b"first"
    assert (sequence, dropped(second)) == (2, (3, 33))
    assert not list(folder.glob("*.batch"))


def test_a_batch_that_the_ledger_refuses_is_kept_aside(open_spool, folder):
    spool = open_spool()
    spool.append(b"poison", 3, 33)
    spool.give_up(spool.first(), "rejected")
    ((_, sequence, batch),) = taken(spool)
    assert (sequence, dropped(batch)) == (1, (3, 33))
    (kept,) = folder.glob("*.rejected")
    assert kept.read_bytes().endswith(b"poison")


def test_giving_up_that_was_interrupted_leaves_one_of_two(open_spool, folder):
    spool = open_spool()
    spool.append(b"whole", 3, 33)
    (path,) = folder.glob("*.batch")
    data = path.read_bytes()
    spool.give_up(spool.first())
    path.write_bytes(data)
    spool = open_spool()
    assert len(spool) == 1
    ((_, _, batch),) = taken(spool)
    assert dropped(batch) == (3, 33)
    assert not list(folder.glob("*.batch"))


def test_a_new_epoch_gives_all_that_waits_new_numbers(open_spool):
    spool = open_spool()
    for number in range(3):
        spool.append(b"batch %d" % number, 1, 1)
    spool.written(spool.first())
    spool.begin_again()
    spool.append(b"after", 1, 1)
    assert taken(spool) == [(1001, 1, b"batch 1"), (1001, 2, b"batch 2"), (1001, 3, b"after")]


def test_a_router_whose_id_is_used_by_another_goes_on_with_a_new_one(open_spool):
    spool = open_spool()
    before = spool.router_id
    spool.append(b"batch", 1, 1)
    spool.begin_again(is_shared=True)
    after = spool.router_id
    assert after != before
    spool = open_spool()
    assert spool.router_id == after
    assert taken(spool) == [(1001, 1, b"batch")]


def test_what_a_full_disk_does_not_take_is_told_with_the_next_batch(open_spool, folder, monkeypatch):
    spool = open_spool()
    spool.append(b"before", 1, 1)
    full = itertools.chain([OSError(28, "No space left on device")] * 2, itertools.repeat(None))
    write = spool._replace

    def replace(*arguments):
        if (error := next(full)) is not None:
            raise error
        write(*arguments)

    monkeypatch.setattr(spool, "_replace", replace)
    spool.append(b"lost", 2, 20)
    spool.append(b"lost", 3, 30)
    assert spool.dropped_requests == 50
    spool.append(b"after", 1, 1)
    found = taken(spool)
    assert [sequence for _, sequence, _ in found] == [1, 2, 3]
    assert dropped(found[1][2]) == (5, 50)
    assert found[2][2] == b"after"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"9" * 30, b"9" * 5000, b"", "٣".encode()])
def test_a_damaged_file_of_the_folder_stops_no_router(open_spool, folder, damage):
    open_spool().append(b"first", 1, 1)
    for name in ("epoch", "router-id", "leases", f"{'9' * 100}-1-1-1.batch", "٣-٣-٣-٣.batch", "1-2-3-4.batch"):
        (folder / name).write_bytes(damage)
    spool = open_spool()
    assert 0 < spool.epoch < 1 << 63
    assert spool.router_id.isprintable()
    spool.append(b"second", 1, 1)
    assert [batch for _, _, batch in taken(spool)][-2:] == [b"first", b"second"]


def test_what_is_spooled_by_the_clock_of_a_machine_is_found_again(folder):
    spool = LedgerSpool(folder, 1 << 20, time.time_ns)
    spool.open()
    spool.append(b"before", 1, 1)
    epoch = spool.epoch
    spool.close()
    later = LedgerSpool(folder, 1 << 20, lambda: 1)
    later.open()
    assert [batch for _, _, batch in taken(later)] == [b"before"]
    assert later.epoch > epoch
