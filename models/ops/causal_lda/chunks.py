"""Chunks of a user's history and the boundaries between them, with the bookkeeping of running over them in blocks.

Legend: B users, T events, C events per chunk (= tile), N chunks, R = N + B boundaries, G chunks of a block.

    user's events   [a b c d] [e f g h] [i . . .]         C = 4, 3 chunks
    boundaries     ^0        ^1        ^2        ^3       0: before any event; 3: after all, chunk full or not

A user with n chunks has n + 1 boundaries (an empty one has 1), laid end to end over users: chunk n starts at boundary
n + user[n] and ends at the next one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from elastic_rec.models.tiles import TileLayout

BLOCK_EVENTS = 4096  # worked on at a time: their scores stay in a CPU's cache, and bound the memory of an inner result


class Block(NamedTuple):
    """Chunks [first, end) and their events [first_token, end_token).

    starts_S: which of the chunks, counted from `first`, are their users' first ones, and have no chunk before them.
    """

    first: int
    end: int
    first_token: int
    end_token: int
    starts_S: torch.Tensor


@dataclass(frozen=True)
class Chunks:
    """tiles: the events cut in chunks. before_N: the boundary each chunk starts at. first_B, end_B: a user's first
    and last boundary. first_R, last_R: the same, for the user of each boundary. source_R: where [users ; chunks] keep
    what a boundary adds to the one before: the user's start, or the chunk that ends there.
    steps: 2^steps >= boundaries of any user. blocks: bounds on the host.
    """

    tiles: TileLayout
    before_N: torch.Tensor
    first_B: torch.Tensor
    end_B: torch.Tensor
    first_R: torch.Tensor
    last_R: torch.Tensor
    source_R: torch.Tensor
    steps: int
    blocks: list[Block]

    @staticmethod
    def build(offsets_B1: torch.Tensor, num_tokens: int, chunk: int) -> Chunks:
        """On CUDA this waits for the device, as `TileLayout.build` does."""
        tiles = TileLayout.build(offsets_B1, num_tokens, chunk)
        device, num_chunks, num_users = offsets_B1.device, tiles.user_N.numel(), tiles.num_users
        chunks_B = (tiles.offsets_B1.diff() + (chunk - 1)) // chunk
        end_B = (chunks_B + 1).cumsum(0) - 1
        first_B = end_B - chunks_B
        user_R = torch.repeat_interleave(
            torch.arange(num_users, device=device), chunks_B + 1, output_size=num_chunks + num_users
        )
        number_R = torch.arange(num_chunks + num_users, device=device)
        is_first_R = number_R == first_B[user_R]
        before_N = torch.arange(num_chunks, device=device) + tiles.user_N
        longest = int(chunks_B.max()) + 1 if num_users else 1
        return Chunks(
            tiles=tiles,
            before_N=before_N,
            first_B=first_B,
            end_B=end_B,
            first_R=first_B[user_R],
            last_R=end_B[user_R],
            source_R=torch.where(is_first_R, user_R, number_R - user_R + (num_users - 1)),
            steps=(longest - 1).bit_length(),
            blocks=_blocks(tiles, before_N == first_B[tiles.user_N], num_chunks, num_tokens, chunk),
        )

    @property
    def chunk(self) -> int:
        """Events per chunk, C."""
        return self.tiles.valid_NC.shape[1]

    @property
    def num_boundaries(self) -> int:
        """Boundaries of all users, R."""
        return self.first_R.numel()

    def last_of_chunk_N(self) -> torch.Tensor:
        """The newest event of each chunk."""
        return self.tiles.token_NC[self.chunk - 1 :: self.chunk]

    def take(self, block: Block, x_T: torch.Tensor) -> torch.Tensor:
        """(T, ...) contiguous -> (G, C, ...), padding slots repeating the user's last event. Without padding a view."""
        shape, num_slots = (block.end - block.first, self.chunk, *x_T.shape[1:]), (block.end - block.first) * self.chunk
        if block.end_token - block.first_token == num_slots:
            return x_T[block.first_token : block.end_token].view(shape)
        slots = slice(block.first * self.chunk, block.first * self.chunk + num_slots)
        return x_T.index_select(0, self.tiles.token_NC[slots]).view(shape)

    def take_chunk(self, number: int, x_T: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (C, ...) of one chunk."""
        return x_T.index_select(0, self.tiles.token_NC[number * self.chunk : (number + 1) * self.chunk])

    def put(self, block: Block, out_T: torch.Tensor, x_GC: torch.Tensor) -> None:
        """Write (G, C, ...) to its rows of (T, ...); padding slots are dropped. A gather as well: no atomics."""
        rows = out_T[block.first_token : block.end_token]
        if rows.shape[0] == x_GC.shape[0] * self.chunk:
            rows.view(x_GC.shape).copy_(x_GC)
        else:
            slots = self.tiles.slot_T[block.first_token : block.end_token] - block.first * self.chunk
            torch.index_select(x_GC.flatten(0, 1), 0, slots, out=rows)


def _blocks(tiles: TileLayout, is_start_N: torch.Tensor, num_chunks: int, num_tokens: int, chunk: int) -> list[Block]:
    per_block = max(1, BLOCK_EVENTS // chunk)
    edges = [*range(0, num_chunks, per_block), num_chunks]
    device = is_start_N.device
    first_tokens = tiles.token_NC[::chunk][torch.tensor(edges[:-1], dtype=torch.int64, device=device)]
    tokens = [*first_tokens.tolist(), num_tokens]
    starts_X = is_start_N.nonzero().squeeze(1)
    starts = starts_X.tolist()
    blocks = []
    for (first, end), (first_token, end_token) in zip(pairwise(edges), pairwise(tokens), strict=True):
        mine = slice(bisect_left(starts, first), bisect_left(starts, end))
        blocks.append(Block(first, end, first_token, end_token, starts_X[mine] - first))
    return blocks
