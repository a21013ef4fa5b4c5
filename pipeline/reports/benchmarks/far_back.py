"""suite=far_back: which models find an event that lies 10,000 or 100,000 events back (far_back_set.py).

ELASTIC causal reads the whole history, in evaluation in windows that carry its state. Two others show what a bound on
the history costs: the same weights with the newest events only, and SASRec trained and evaluated with these.
All are trained on the question's answer alone. In training the greatest distance grows from 64 events: what to look
for is learned on short histories, because in a long one the deciding event is one among thousands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.config import MemoryConfig, Time, TowerConfig
from elastic_rec.models.towers.elastic.windows import WindowedTower
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, FarBackConfig
from elastic_rec.pipeline.reports.benchmarks.far_back_set import draw
from elastic_rec.pipeline.reports.benchmarks.figures import at_least, markdown_table
from elastic_rec.pipeline.reports.benchmarks.suite import Log, Report
from elastic_rec.pipeline.reports.plots import BLUE, GREY, LIGHT_BLUE, RED, plt

SHARE_OF_BAYES = 0.9  # what ELASTIC has to reach at every distance
ELASTIC = "ELASTIC causal"
WINDOW = 8_192  # events per window in evaluation


class Guesser(nn.Module):
    """Guesses the item after a history: forward(items_BN) -> logits (B, items)."""

    def __init__(self, far: FarBackConfig, tower: TowerConfig, memory: MemoryConfig):
        super().__init__()
        self.carries = tower.kind.has_states
        self.items = nn.Embedding(far.num_items, tower.width)
        nn.init.normal_(self.items.weight, std=0.5 * tower.width**-0.5)
        self.norm = nn.LayerNorm(tower.width)
        if self.carries:
            self.tower = WindowedTower(tower, memory)
        else:
            self.tower = build_tower(tower, memory, max_history=far.window)
        self.head = nn.Sequential(nn.LayerNorm(tower.width), nn.Linear(tower.width, tower.width))

    def forward(self, items_BN: torch.Tensor) -> torch.Tensor:
        if not self.carries:
            return self._guess(items_BN)
        windows = (items_BN,) if self.training else items_BN.split(WINDOW, dim=1)
        return [self._guess(window, (number, len(windows))) for number, window in enumerate(windows)][-1]

    def _guess(self, items_BN: torch.Tensor, *window: tuple[int, int]) -> torch.Tensor:
        users, length = items_BN.shape
        offsets_B1 = torch.arange(users + 1, device=items_BN.device) * length
        tokens_TD = self.norm(self.items(items_BN.flatten()))
        output = self.tower(tokens_TD, offsets_B1, torch.zeros_like(items_BN.flatten()), False, *window)
        return self.head(output.user_embedding) @ self.items.weight.T


def train(
    config: BenchmarkConfig, tower: TowerConfig, memory: MemoryConfig, farthest: int, device: str, log: Log
) -> Guesser:
    """Trains on distances of 16 to `farthest` events; the greatest grows during the first three quarters of steps."""
    torch.manual_seed(config.seed)
    far, generator = config.far_back, torch.Generator().manual_seed(config.seed)
    guesser = Guesser(far, tower, memory)
    optimizer = torch.optim.Adam(guesser.parameters(), far.learning_rate)
    guesser.to(device).train()
    start, nearest = time.perf_counter(), min(64, farthest)
    for step in range(far.steps):
        limit = nearest * (farthest / nearest) ** min(1.0, step / (0.75 * far.steps))
        distance = int(16 * (limit / 16) ** float(torch.rand((), generator=generator)))
        questions = draw(far, max(16, far.step_events // distance), distance, generator)
        loss = F.cross_entropy(guesser(questions.items_BN.to(device)), questions.targets_B.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step + 1 == far.steps:
            log(f"  step {step}  distance {distance:,}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s")
    return guesser.eval()


@dataclass
class Hits:
    """Rates over `users` questions. hit_rate: the first guess is what came next, at most the Bayes rate.

    found_rate: the first guess is the answer to the marker."""

    model: str
    distance: int
    users: int
    hit_rate: float
    found_rate: float


@torch.inference_mode()
def evaluate(
    config: BenchmarkConfig, name: str, guesser: Guesser, window: int | None, distance: int, device: str
) -> Hits:
    """window: how many newest events the model sees; None: all. The users are the same for every model."""
    far, generator = config.far_back, torch.Generator().manual_seed(config.seed + distance)
    users = min(far.users, max(64, far.max_events // distance))
    per_batch, hits, found = max(1, 200_000 // distance), 0, 0
    for first in range(0, users, per_batch):
        items_BN, targets_B = draw(far, min(per_batch, users - first), distance, generator)
        shown_BN = items_BN if window is None else items_BN[:, -window:]
        guess_B = guesser(shown_BN.to(device)).argmax(-1).cpu()
        hits += int((guess_B == targets_B).sum())
        found += int((guess_B == items_BN[:, -1 - distance] + far.markers).sum())
    return Hits(name, distance, users, hits / users, found / users)


def evaluate_all(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Hits]:
    """Trains both models, then evaluates each at every distance."""
    far, memory = config.far_back, config.memory
    causal = replace(config.model, tower="elastic_causal", time=Time.none)
    full, off = replace(causal, tower="sasrec"), replace(memory, enabled=False)
    within = min(far.train_distance, far.window * 3 // 4)  # with the noise before it, all of a history is in the window
    elastic = train(config, causal, memory, far.train_distance, device, log)
    sasrec = train(config, full, off, within, device, log)
    for name, guesser, window in (
        (ELASTIC, elastic, None),
        (f"ELASTIC causal, newest {far.window:,}", elastic, far.window),
        (f"SASRec, newest {far.window:,}", sasrec, far.window),
    ):
        for distance in far.distances:
            hits = evaluate(config, name, guesser, window, distance, device)
            log(f"{name}, {distance:,} events back: hit rate {hits.hit_rate:.3f}, Bayes {far.bayes:.3f}")
            yield hits


def measure(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Report]:
    """One report, of all models at all distances."""
    far, found = config.far_back, list(evaluate_all(config, device, log))
    verdicts = []
    for hits in found[: len(far.distances)]:  # ELASTIC's come first
        name = f"hit rate at {hits.distance:,} events"
        verdicts += at_least(name, SHARE_OF_BAYES * far.bayes, hits.hit_rate)
    rates = {f"{hits.model} at {hits.distance}": round(hits.hit_rate, 4) for hits in found}
    yield Report(
        figures={"bayes": far.bayes, **rates},
        samples={"chance": 1 / far.markers, "hits": [asdict(hits) for hits in found]},
        verdicts=verdicts,
        lines=_lines(far, found),
        circumstances={"device": device},
        plot=lambda: _plot(far.bayes, _by_model(found)),
    )


def _by_model(found: list[Hits]) -> dict[str, list[Hits]]:
    return {name: [hits for hits in found if hits.model == name] for name in dict.fromkeys(h.model for h in found)}


def _lines(far: FarBackConfig, found: list[Hits]) -> list[str]:
    models, rows = _by_model(found), []
    for same in zip(*models.values(), strict=True):
        users = same[0].users
        error = math.sqrt(far.bayes * (1 - far.bayes) / users)
        rates = (f"{hits.hit_rate:.3f}" for hits in same)
        rows.append((f"{same[0].distance:,}", f"{users:,} (standard error {error:.3f})", *rates))
    return [
        f"Share of users whose next item is the first guess; Bayes rate {far.bayes:.3f}, chance {1 / far.markers:.3f}. "
        f"Trained up to {far.train_distance:,} events back, SASRec within its window.",
        "",
        *markdown_table(("d", "users", *models), rows),
    ]


def _plot(bayes: float, models: dict[str, list[Hits]]) -> Figure:
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for (name, found), color in zip(models.items(), (BLUE, LIGHT_BLUE, RED), strict=True):
        axis.plot([h.distance for h in found], [h.hit_rate for h in found], "o-", ms=4, color=color, label=name)
    axis.axhline(bayes, ls="--", color=GREY, label="Bayes rate")
    axis.set(xscale="log", xlabel="events since the deciding one", ylabel="hit rate", ylim=(0, 1))
    axis.legend()
    return figure
