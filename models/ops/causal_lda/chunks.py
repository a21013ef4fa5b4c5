"""Chunks of a user's history and the boundaries between them, with the bookkeeping of running over them in blocks.

Legend: B users, T events, C events per chunk (= tile), N chunks, R = N + B boundaries.

    user's events   [a b c d] [e f g h] [i . . .]         C = 4, 3 chunks
    boundaries     ^0        ^1        ^2        ^3       0: before any event; 3: after all, chunk full or not

A user with n chunks has n + 1 boundaries (an empty one has 1), laid end to end over users: chunk n starts at boundary
n + user[n] and ends at the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from elastic_rec.models.jagged import TileLayout

BLOCK = 128  # chunks worked on at a time: their scores stay in a CPU's cache, and bound the memory of an inner result


class Block(NamedTuple):
    """Chunks [first, end), their events [first_token, end_token), and those of chunks [first - 1, end - 1)."""

    first: int
    end: int
    first_token: int
    end_token: int
    previous_first_token: int
    previous_end_token: int


@dataclass(frozen=True)
class Chunks:
    """tiles: the events cut in chunks. before_N: the boundary each chunk starts at. first_B, end_B: a user's first
    and last boundary. first_R, last_R: the same, for the user of each boundary. previous_N: the user's chunk before
    this one, or itself where `has_previous_N` is False. steps: 2^steps >= boundaries of any user.
    blocks: bounds on the host.
    """

    tiles: TileLayout
    before_N: torch.Tensor
    first_B: torch.Tensor
    end_B: torch.Tensor
    first_R: torch.Tensor
    last_R: torch.Tensor
    previous_N: torch.Tensor
    has_previous_N: torch.Tensor
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
        number_N = torch.arange(num_chunks, device=device)
        before_N = number_N + tiles.user_N
        has_previous_N = before_N > first_B[tiles.user_N]
        longest = int(chunks_B.max()) + 1 if num_users else 1

        edges = [*range(0, num_chunks, BLOCK), num_chunks]
        marks = torch.tensor([[e, max(e - 1, 0)] for e in edges[:-1]], dtype=torch.int64, device=device).view(-1, 2)
        start_N = tiles.token_NC[::chunk]
        tokens = [*start_N[marks].tolist(), [num_tokens, int(start_N[-1]) if num_chunks else 0]]
        blocks = [
            Block(edges[b], edges[b + 1], tokens[b][0], tokens[b + 1][0], tokens[b][1], tokens[b + 1][1])
            for b in range(len(edges) - 1)
        ]
        return Chunks(
            tiles=tiles,
            before_N=before_N,
            first_B=first_B,
            end_B=end_B,
            first_R=first_B[user_R],
            last_R=end_B[user_R],
            previous_N=torch.where(has_previous_N, number_N - 1, number_N),
            has_previous_N=has_previous_N,
            steps=(longest - 1).bit_length(),
            blocks=blocks,
        )

    @property
    def chunk(self) -> int:
        return self.tiles.valid_NC.shape[1]

    @property
    def num_boundaries(self) -> int:
        return self.first_R.numel()

    def last_of_chunk_N(self) -> torch.Tensor:
        """The newest event of each chunk."""
        return self.tiles.token_NC[self.chunk - 1 :: self.chunk]
