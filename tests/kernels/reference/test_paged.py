"""Batches over paged caches: positions, cache places and the grouping of decode rows."""

from __future__ import annotations

import numpy as np
import torch

from lockstep.kernels.reference.paged import build_batch, gather_pages

PAGES = np.array([[4, 9, 0], [7, 0, 0], [2, 3, 5]], np.int32)


def test_positions_and_places() -> None:
    batch, positions = build_batch(np.array([6, 0, 3]), np.array([1, 2, 6]), 1, PAGES, page_size=4)
    assert positions.tolist() == [6, 0, 1, 3, 4, 5, 6, 7, 8]
    assert batch.write_T.tolist() == [9 * 4 + 2, 28, 29, 2 * 4 + 3, 12, 13, 14, 15, 20]
    assert batch.query_starts == (0, 1, 3, 9)
    assert batch.lengths == (7, 2, 9)
    assert (batch.query_start_R1.tolist(), batch.lengths_R.tolist()) == ([0, 1, 3, 9], [7, 2, 9])
    rows = [(row.begin, row.end, row.start, row.length, row.pages.tolist()) for row in batch.extends()]
    assert rows == [(1, 3, 0, 2, [7]), (3, 9, 3, 9, [2, 3, 5])]


def test_decode_rows_of_similar_length_form_one_group_in_order() -> None:
    batch, _ = build_batch(np.array([6, 1, 9]), np.array([1, 1, 1]), 3, PAGES, page_size=4)
    (group,) = batch.decode_groups
    assert group.rows is None
    assert group.pages.view(3, 3).tolist() == PAGES.tolist()
    assert group.mask.sum(-1).flatten().tolist() == [7, 2, 10]


def test_long_and_short_decode_rows_are_not_padded_to_each_other() -> None:
    lengths = np.array([3, 900, 40, 1000, 8, 300])
    pages = np.arange(6 * 63, dtype=np.int32).reshape(6, 63)
    batch, _ = build_batch(lengths - 1, np.ones(6, np.int64), 6, pages, page_size=16)
    groups = batch.decode_groups
    rows = [group.rows.tolist() for group in groups if group.rows is not None]
    assert sorted(row for group in rows for row in group) == [0, 1, 2, 3, 4, 5]
    assert rows[0] == [1, 3]
    for group in groups:
        assert group.rows is not None
        assert group.mask.sum(-1).flatten().tolist() == lengths[group.rows.numpy()].tolist()
        assert group.pages.view(group.num_rows, -1)[:, 0].tolist() == pages[group.rows.numpy(), 0].tolist()
    assert sum(group.mask.numel() for group in groups) < 2.1 * lengths.sum()


def test_no_rows() -> None:
    batch, positions = build_batch(
        np.empty(0, np.int64), np.empty(0, np.int64), 0, np.zeros((0, 1), np.int32), page_size=4
    )
    assert positions.shape == (0,)
    assert batch.decode_groups == ()
    assert list(batch.extends()) == []


def test_gathered_pages_follow_the_table() -> None:
    cache = torch.arange(10 * 4 * 2).view(40, 2)
    entries = gather_pages(cache, torch.tensor([3, 0], dtype=torch.int32), 4, torch.int64)
    assert torch.equal(entries, torch.cat([cache[12:16], cache[0:4]]))
