"""What a history store holds, in figures. One pass over its row groups.

Memory holds one row group, a counter per vocabulary entry, and one per distinct length, day and gap bin; never the
events. (Of N events at most sqrt(2 N) histories differ in length.) Everything is exact, but for the quantiles of gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.ingestion.checks import DAY_S
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.manifest import MANIFEST
from elastic_rec.feature_store.table.own_files import IMPRESSIONS
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.feature_store.utils.arrow import flat_list
from elastic_rec.feature_store.utils.prefetch import prefetch
from elastic_rec.feature_store.utils.progress import progress

# A float64 has 52 bits of mantissa; 6 of them and the exponent make 64 bins per doubling, integers below 128 exact.
_DROPPED_BITS = 52 - 6


class Tally:
    """How often each integer has occurred. values, counts: (V,) int64, values ascending: [2, 5], [1, 3] for 5 2 5 5."""

    def __init__(self) -> None:
        self.values, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, data: np.ndarray) -> None:
        """Counts the integers of an array, too."""
        values, counts = np.unique(data, return_counts=True)
        self.values, places = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        before, self.counts = self.counts, np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, places, np.concatenate([before, counts]))

    @property
    def total(self) -> int:
        """How many integers were counted."""
        return int(self.counts.sum())

    def percentile(self, percent: int) -> int:
        """The least value that at least so many percent of the data do not exceed; 0: the least of all."""
        rank = max(1, -(-percent * self.total // 100))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])


class Cut(NamedTuple):
    """What max_history takes away: users with more events than that, and their events beyond it."""

    users: int
    events: int


@dataclass(frozen=True)
class StoreStatistics:
    """lengths: events per user. days: of events, since 1970, UTC. gap_bins: time between neighbours of a user, in bins.
    longest_gap: in the store's unit. counts: events by vocabulary index, (V,) for the item and each context column."""

    lengths: Tally
    days: Tally
    gap_bins: Tally
    longest_gap: int
    counts: dict[str, np.ndarray]

    def cut(self, max_history: int) -> Cut:
        """What a limit on the history takes away."""
        beyond = np.maximum(self.lengths.values - max_history, 0)
        return Cut(int(self.lengths.counts[beyond > 0].sum()), int((self.lengths.counts * beyond).sum()))

    def gap_percentile(self, percent: int) -> int:
        """In the store's unit; exact below 128, else too small by at most 1/64 (100: exact)."""
        return self.longest_gap if percent == 100 else int(bin_starts(np.int64(self.gap_bins.percentile(percent))))

    def ranked(self, column: str = "item") -> np.ndarray:
        """Indices of the ids that occur, most frequent first, ties by index; padding and unknown left out."""
        counts = self.counts[column][FIRST:]
        order = np.argsort(-counts, kind="stable")
        return FIRST + order[: np.count_nonzero(counts)]


def measure(store: Store) -> StoreStatistics:
    """Reads all events of the store; DataError where its files are not what the manifest says."""
    decoder = Decoder(store, store.columns, cache=False)
    lengths, days, gaps, longest = Tally(), Tally(), Tally(), 0
    counts = {name: np.zeros(store.manifest.vocabularies[name].size, np.int64) for name in store.columns}
    bar = progress("describe", total=store.num_events, unit=" events")
    for users in prefetch(decoder.decode, range(len(decoder.groups)), workers=1):
        lengths.add(users.lengths)
        days.add(users.times // (DAY_S * users.units_per_second))
        between = gaps_of(users)
        gaps.add(gap_bins(between))
        longest = max(longest, int(between.max(initial=0)))
        for name, indices in users.columns.items():
            counts[name] += np.bincount(indices, minlength=len(counts[name]))
        bar.update(len(users.times))
    bar.close()
    return StoreStatistics(lengths, days, gaps, longest, counts)


def gaps_of(users: Sequences) -> np.ndarray:
    """(T - U,) int64: time from each event to the next one of its user."""
    same_user = np.ones(max(0, len(users.times) - 1), bool)
    same_user[users.offsets[1:-1] - 1] = False
    return np.diff(users.times)[same_user]


def gap_bins(gaps: np.ndarray) -> np.ndarray:
    """Numbers of logarithmic bins, 64 per doubling, rising with the gap (>= 0)."""
    return gaps.astype(np.float64).view(np.int64) >> _DROPPED_BITS


def bin_starts(bins: np.ndarray) -> np.ndarray:
    """The least gap of each bin, float64."""
    return (bins << _DROPPED_BITS).view(np.float64)


def top_share(counts: np.ndarray, share: float) -> float:
    """Part of all events that goes to this share (rounded up) of the ids that occur, the most frequent ones.

    counts: of each id, falling, none of them 0."""
    return float(counts[: int(np.ceil(share * len(counts)))].sum() / max(1, counts.sum()))


def has_impressions(store: Store) -> bool:
    """Whether there are impressions beside the histories."""
    return (store.path / IMPRESSIONS / MANIFEST).is_file()


def describe_impressions(store: Store) -> dict:
    """Counts of the store's impressions and the mean of each label over the candidates that have one."""
    table = ImpressionTable(store)
    manifest = table.manifest
    sums, known = {}, {}
    for name in manifest.labels:
        sums[name], known[name] = 0.0, 0
        for file, entry in enumerate(manifest.files):
            for group in range(len(entry.row_groups)):
                rows = table.read_groups(file, [group], [f"candidates.list.element.{name}"])
                labels = flat_list(rows["candidates"])[1].field(name).to_numpy(zero_copy_only=False)
                sums[name] += float(np.nansum(labels, dtype=np.float64))
                known[name] += int(np.count_nonzero(~np.isnan(labels)))
    return {
        "impressions": manifest.num_impressions,
        "candidates": manifest.num_candidates,
        "unknown_candidates": manifest.num_unknown_candidates,
        "labels": {name: {"known": known[name], "mean": sums[name] / max(1, known[name])} for name in known},
        "context": {name: entry.size - FIRST for name, entry in manifest.vocabularies.items()},
    }
