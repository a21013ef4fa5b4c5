"""suite=far_back: who still finds an event that lies 10,000 or 100,000 events back (far_back_set.py).

ELASTIC causal reads the whole history, in evaluation in windows that carry its state. Beside it, what a bound on the
history costs: the same weights given the newest events only, and SASRec trained and asked with these. All are trained
on the question's answer alone. In training the farthest distance grows from 64 events: in a long history the deciding
event is a grain among thousands, and what to look for is learned on short ones.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.config import MemoryConfig, Time, TowerConfig
from elastic_rec.models.towers.elastic.windows import WindowedTower
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.far_back_set import FarBackConfig, draw
from elastic_rec.pipeline.reports.benchmarks.machine import describe_machine

SHARE_OF_BAYES = 0.9  # what ELASTIC has to reach at every distance
ELASTIC = "ELASTIC causal"
PART = 8_192  # events per window in evaluation


class Guesser(nn.Module):
    """forward(items_BN) -> logits (B, items)."""

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
        parts = (items_BN,) if self.training else items_BN.split(PART, dim=1)
        return [self._guess(part, (number, len(parts))) for number, part in enumerate(parts)][-1]

    def _guess(self, items_BN: torch.Tensor, *window: tuple[int, int]) -> torch.Tensor:
        users, length = items_BN.shape
        offsets_B1 = torch.arange(users + 1, device=items_BN.device) * length
        tokens_TD = self.norm(self.items(items_BN.flatten()))
        output = self.tower(tokens_TD, offsets_B1, torch.zeros_like(items_BN.flatten()), False, *window)
        return self.head(output.user_embedding) @ self.items.weight.T


def train(
    config: BenchmarkConfig, tower: TowerConfig, memory: MemoryConfig, farthest: int, device: str, say: Callable
) -> Guesser:
    torch.manual_seed(config.seed)
    far, generator = config.far_back, torch.Generator().manual_seed(config.seed)
    guesser = Guesser(far, tower, memory)
    optimiser = torch.optim.Adam(guesser.parameters(), far.learning_rate)
    guesser.to(device).train()
    start, nearest = time.perf_counter(), min(64, farthest)
    for step in range(far.steps):
        limit = nearest * (farthest / nearest) ** min(1.0, step / (0.75 * far.steps))
        distance = int(16 * (limit / 16) ** float(torch.rand((), generator=generator)))
        questions = draw(far, max(16, far.step_events // distance), distance, generator)
        loss = F.cross_entropy(guesser(questions.items_BN.to(device)), questions.targets_B.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step + 1 == far.steps:
            say(f"  step {step}  distance {distance:,}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s")
    return guesser.eval()


@dataclass
class Hits:
    contestant: str
    distance: int
    users: int
    hit_rate: float
    found_rate: float


@torch.inference_mode()
def evaluate(
    config: BenchmarkConfig, name: str, guesser: Guesser, window: int | None, distance: int, device: str
) -> Hits:
    """hit_rate: the first guess is what came next, at most the Bayes rate; found_rate: it is the answer to the marker.

    window: how many newest events are shown; None: all. The same users for every contestant."""
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


def compete(config: BenchmarkConfig, device: str, say: Callable[[str], None]) -> Iterator[Hits]:
    far, memory = config.far_back, config.memory
    causal = replace(config.model, tower="elastic_causal", time=Time.none)
    full, off = replace(causal, tower="sasrec"), replace(memory, enabled=False)
    within = min(far.train_distance, far.window * 3 // 4)  # with the noise before it, all of a history is in the window
    elastic = train(config, causal, memory, far.train_distance, device, say)
    sasrec = train(config, full, off, within, device, say)
    for name, guesser, window in (
        (ELASTIC, elastic, None),
        (f"ELASTIC causal, newest {far.window:,}", elastic, far.window),
        (f"SASRec, newest {far.window:,}", sasrec, far.window),
    ):
        for distance in far.distances:
            hits = evaluate(config, name, guesser, window, distance, device)
            say(f"{name}, {distance:,} events back: hit rate {hits.hit_rate:.3f}, Bayes {far.bayes:.3f}")
            yield hits


def run(config: BenchmarkConfig, *, device: str, out: Path, say: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Trains, evaluates, writes OUT/far_back.{json,md,png}; returns (figures for the last line, missed targets)."""
    start, far = time.perf_counter(), config.far_back
    if config.threads:
        torch.set_num_threads(config.threads)
    machine, found = describe_machine(), list(compete(config, device, say))
    missed = [
        f"hit rate {hits.hit_rate:.3f} at {hits.distance:,} events, target {SHARE_OF_BAYES * far.bayes:.3f}"
        for hits in found
        if hits.contestant == ELASTIC and hits.hit_rate < SHARE_OF_BAYES * far.bayes
    ]
    context = {
        "command": "python pipeline/benchmark.py " + " ".join(sys.argv[1:]),
        "machine": machine | {"device": device, "threads": torch.get_num_threads()},
        "seconds": round(time.perf_counter() - start, 1),
        "model": asdict(config.model),
        "memory": asdict(config.memory),
        "far_back": asdict(far),
        "bayes": far.bayes,
        "chance": 1 / far.markers,
    }
    write_json(out / "far_back.json", {**context, "hits": [asdict(hits) for hits in found], "missed": missed})
    write_text(out / "far_back.md", _table(context, found))
    _plot(out / "far_back.png", context, found)
    rates = {f"{hits.contestant} at {hits.distance}": round(hits.hit_rate, 4) for hits in found}
    return {
        "suite": "far_back",
        "seconds": context["seconds"],
        "json": str(out / "far_back.json"),
        "bayes": far.bayes,
        **rates,
        "missed": missed,
    }, missed


def _table(context: dict, found: list[Hits]) -> str:
    machine, names = context["machine"], list(dict.fromkeys(hits.contestant for hits in found))
    rates = {(hits.contestant, hits.distance): hits for hits in found}
    lines = [
        "# Far back: the deciding event lies d events back",
        "",
        f"`{context['command']}`, {context['seconds']:.0f} s; {machine['processor']}, {machine['device']}, "
        f"threads {machine['threads']}, torch {machine['torch']}.",
        "",
        f"Share of users whose next item is the first guess; Bayes rate {context['bayes']:.3f}, chance "
        f"{context['chance']:.3f}. Trained up to {context['far_back']['train_distance']:,} events back, SASRec within "
        "its window.",
        "",
        "| d | users | " + " | ".join(names) + " |",
        "|--:|--:|" + "--:|" * len(names),
    ]
    for distance in context["far_back"]["distances"]:
        row = [rates[name, distance] for name in names]
        error = math.sqrt(context["bayes"] * (1 - context["bayes"]) / row[0].users)
        cells = " | ".join(f"{hits.hit_rate:.3f}" for hits in row)
        lines.append(f"| {distance:,} | {row[0].users:,} (standard error {error:.3f}) | {cells} |")
    return "\n".join(lines) + "\n"


def _plot(path: Path, context: dict, found: list[Hits]) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    for name, color in zip(
        dict.fromkeys(hits.contestant for hits in found), ("#2a6f97", "#61a5c2", "#bc4749"), strict=True
    ):
        mine = [hits for hits in found if hits.contestant == name]
        axis.plot([h.distance for h in mine], [h.hit_rate for h in mine], "o-", ms=4, color=color, label=name)
    axis.axhline(context["bayes"], ls="--", color="#8d99ae", label="Bayes rate")
    axis.set(xscale="log", xlabel="events since the deciding one", ylabel="hit rate", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
