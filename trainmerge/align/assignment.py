"""The best one-to-one assignment of rows to columns: Kuhn and Munkres, with shortest augmenting paths."""

import numpy as np
from torch import Tensor, from_numpy


def assign(cost: Tensor) -> Tensor:
    """The column of every row with the least sum of costs; [n, n] -> [n].

    One pass where the rows' cheapest columns differ, as in two orders of the same units. At most n^3 steps
    else, of which n at a time are one pass of numpy: a second for n of 1,000, about.

    >>> from torch import tensor
    >>> assign(tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
    [1, 0, 2]
    """
    table = cost.double().cpu().numpy()
    count = len(table)
    nearest = table.argmin(axis=1)
    rows, columns = table.min(axis=1), np.zeros(count + 1)  # duals; the last column is none
    owner = np.full(count + 1, -1)  # the row of every column
    owner[nearest[::-1]] = np.arange(count)[::-1]  # of several rows the first
    for row in np.flatnonzero(owner[nearest] != np.arange(count)):
        _augment(table, rows, columns, owner, int(row))
    found = np.empty(count, dtype=np.int64)
    found[owner[:count]] = np.arange(count)
    return from_numpy(found)


def _augment(table: np.ndarray, rows: np.ndarray, columns: np.ndarray, owner: np.ndarray, row: int) -> None:
    """Give `row` a column, along the shortest path that moves other rows."""
    count = len(table)
    least, before = np.full(count, np.inf), np.full(count, count)
    done = np.zeros(count + 1, dtype=bool)
    column, owner[count] = count, row
    while owner[column] != -1:
        done[column] = True
        slack = table[owner[column]] - rows[owner[column]] - columns[:count]
        nearer = ~done[:count] & (slack < least)
        least[nearer], before[nearer] = slack[nearer], column
        open_columns = np.where(done[:count], np.inf, least)
        following = int(open_columns.argmin())
        step = open_columns[following]
        rows[owner[done]] += step
        columns[done] -= step
        least[~done[:count]] -= step
        column = following
    while column != count:
        owner[column] = owner[before[column]]
        column = int(before[column])
    owner[count] = -1
