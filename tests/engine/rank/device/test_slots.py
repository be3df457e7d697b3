"""Page tables and inputs of slots on a device, beside those that a host makes of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Section
from lockstep.engine.protocol.slot_table import Rows, SlotTable
from lockstep.engine.rank.device.slots import DeviceSlots, new_pages
from lockstep.engine.rank.device.step_arrays import LaneArrays
from lockstep.engine.rank.halves import whole
from lockstep.kernels.reference.paged import build_batch

SLOTS, PAGES, PAGE = 6, 8, 4
FREE_2 = np.array([2], np.int32).tobytes()


class Pool:
    page_size, scratch = PAGE, 99


def _admit(slot: int, pages: list[int], cached: int = 0) -> Admit:
    return Admit(slot, slot, cached, 0, 30, np.array(pages, np.int32).tobytes(), Sampling())


def _pairs(*pairs: tuple[int, int]) -> bytes:
    return np.array(pairs, np.int32).tobytes()


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(SLOTS, PAGES)


@pytest.fixture
def slots() -> DeviceSlots:
    return DeviceSlots(SLOTS, PAGES, Pool(), torch.device("cpu"))  # type: ignore[arg-type]


def test_entries_bring_page_tables_up_to_date(table: SlotTable, slots: DeviceSlots) -> None:
    sections = [
        Section(rebase=True, admit=(_admit(2, [5, 6]), _admit(4, [7]))),
        Section(pages_pairs=_pairs((4, 8), (2, 9), (4, 10))),
        Section(),
        Section(
            free_i32=np.array([2], np.int32).tobytes(), admit=(_admit(2, [11]),), pages_pairs=_pairs((2, 12))
        ),
    ]
    for section in sections:
        table.apply(section, {2: 9, 4: 3})
        places, pages = new_pages(section, table)
        slots.write_pages(torch.from_numpy(places), torch.from_numpy(pages))
        for slot in np.flatnonzero(table.active):
            count = table.num_pages[slot]
            assert slots._pages_S1P[slot, :count].tolist() == table.pages[slot, :count].tolist()
    assert len(new_pages(Section(), table)[0]) == 0
    assert slots._pages_S1P[SLOTS].tolist() == [99] * PAGES, "nothing but scratch behind the last slot"


def test_inputs_are_those_that_a_host_makes(table: SlotTable, slots: DeviceSlots) -> None:
    section = Section(rebase=True, admit=(_admit(1, [5, 6, 3]), _admit(3, [7, 2]), _admit(4, [8, 9, 1, 4])))
    table.apply(section, {1: 9, 3: 3, 4: 13})
    places, pages = new_pages(section, table)
    slots.write_pages(torch.from_numpy(places), torch.from_numpy(pages))
    slots.last_S1[torch.tensor([1, 3])] = torch.tensor([70, 71])
    history = np.arange(SLOTS * 40, dtype=np.int32).reshape(SLOTS, 40)
    draws = np.array([True, True, False])
    rows = Rows(np.array([1, 3, 4]), np.array([9, 4, 2]), np.array([1, 1, 6]), draws, 2)
    lane = LaneArrays(rows, draws, whole(rows), history, slots.scratch)
    sent = [torch.from_numpy(each) for each in lane.arrays]
    tokens_T, positions_T, batch = slots.inputs(lane.on_device(sent))
    wanted, wanted_positions_T = build_batch(rows.starts, rows.counts, 2, table.pages[rows.slots], PAGE)
    assert tokens_T.tolist() == [70, 71, *history[4, 2:8].tolist()]
    assert positions_T.tolist() == wanted_positions_T.tolist()
    assert (batch.lengths, batch.query_starts) == (wanted.lengths, wanted.query_starts)
    for name in ("write_T", "lengths_R", "query_start_R1"):
        assert getattr(batch, name).tolist() == getattr(wanted, name).tolist(), name


def test_idle_rows_read_nothing_and_write_to_scratch(slots: DeviceSlots) -> None:
    rows = Rows(np.array([1, 3]), np.array([9, 4]), np.array([1, 1]), np.array([True, True]), 2)
    history = np.zeros((SLOTS, 40), np.int32)
    lane = LaneArrays(rows, np.array([False, True]), whole(rows), history, slots.scratch)
    _, _, batch = slots.inputs(lane.on_device([torch.from_numpy(each) for each in lane.arrays]))
    assert batch.lengths_R.tolist() == [0, 5]
    assert int(batch.write_T[0]) // PAGE == Pool.scratch
