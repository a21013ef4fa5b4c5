"""Tiles: a jagged batch cut into parts of one size, so that batched matrix products can run on it.

Legend: B users (or prefixes), T their events laid end to end, C events per tile, N tiles.

    users        u0              u1 (empty)   u2
    tokens T     a b c d e                    f g          offsets 0 5 5 7
    tiles (C=4)  [a b c d] [e . . .]          [f g . .]    N = 3, tile_user 0 0 2

Only the last tile of a user is padded: padding stays under C events per user with events, and N <= T/C + B, however
unequal the lengths are. A [B, longest, ...] tensor never exists. A padding slot repeats the user's last event, so that
it holds finite numbers of that same user; whoever reads tiles masks it with `valid_NC`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE = 32  # events per tile: below it the products get too small to be fast, above it short users pay for padding


@dataclass(frozen=True)
class TileLayout:
    """Where each token sits in the tiles, and the way back. Made once per batch, used by every layer.

    offsets_B1: (B+1,) int64, user b's tokens are [offsets[b], offsets[b+1]).
    user_T: (T,) the user of each token.      slot_T: (T,) the token's place among the N*C slots.
    user_N: (N,) the user of each tile.       token_NC: (N*C,) the token in each slot (padding: the user's last).
    valid_NC: (N, C) bool, False on padding.
    """

    offsets_B1: torch.Tensor
    user_T: torch.Tensor
    slot_T: torch.Tensor
    user_N: torch.Tensor
    token_NC: torch.Tensor
    valid_NC: torch.Tensor

    @staticmethod
    def build(offsets_B1: torch.Tensor, num_tokens: int, tile: int = TILE) -> TileLayout:
        """num_tokens: offsets_B1[-1], known to the host from the tokens' shape. On CUDA this waits once, for N."""
        offsets_B1 = offsets_B1.to(torch.int64)
        device, num_users = offsets_B1.device, offsets_B1.numel() - 1
        users_B = torch.arange(num_users, device=device)
        lengths_B = offsets_B1.diff()
        tiles_B = (lengths_B + (tile - 1)) // tile
        first_tile_B = tiles_B.cumsum(0) - tiles_B
        num_tiles = int(tiles_B.sum())

        user_T = torch.repeat_interleave(users_B, lengths_B, output_size=num_tokens)
        slot_T = torch.arange(num_tokens, device=device) + (first_tile_B * tile - offsets_B1[:-1])[user_T]

        user_N = torch.repeat_interleave(users_B, tiles_B, output_size=num_tiles)
        tile_in_user_N = torch.arange(num_tiles, device=device) - first_tile_B[user_N]
        start_N1 = (offsets_B1[user_N] + tile_in_user_N * tile)[:, None]
        end_N1 = offsets_B1[user_N + 1][:, None]
        token_NC = start_N1 + torch.arange(tile, device=device)
        valid_NC = token_NC < end_N1
        token_NC = torch.minimum(token_NC, end_N1 - 1).reshape(-1)
        return TileLayout(offsets_B1, user_T, slot_T, user_N, token_NC, valid_NC)

    @property
    def num_users(self) -> int:
        """Users, those without events included, B."""
        return self.offsets_B1.numel() - 1

    @property
    def num_tokens(self) -> int:
        """Events of all users, T."""
        return self.user_T.numel()

    def to_tiles(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (N, C, ...). Padding slots are copies and send no gradient back."""
        tiles = _ToTiles.apply(tokens, self.slot_T, self.token_NC, self.valid_NC)
        return tiles.view(*self.valid_NC.shape, *tokens.shape[1:])

    def to_tokens(self, tiles: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) -> (T, ...). Padding slots are dropped."""
        return _ToTokens.apply(tiles.flatten(0, 1), self.slot_T, self.token_NC, self.valid_NC)


class _ToTiles(torch.autograd.Function):
    """Both directions and both backwards are gathers: no scatter, so no atomics on CUDA and the same bits every run."""

    @staticmethod
    def forward(ctx, tokens, slot_T, token_NC, valid_NC):
        ctx.save_for_backward(slot_T, token_NC, valid_NC)
        return tokens.index_select(0, token_NC)

    @staticmethod
    def backward(ctx, grad):
        return _ToTokens.apply(grad, *ctx.saved_tensors), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, slot_T, token_NC, valid_NC):
        ctx.save_for_backward(slot_T, token_NC, valid_NC)
        return slots.index_select(0, slot_T)

    @staticmethod
    def backward(ctx, grad):
        slot_T, token_NC, valid_NC = ctx.saved_tensors
        slots = _ToTiles.apply(grad, slot_T, token_NC, valid_NC)
        padding = ~valid_NC.view(-1, *[1] * (grad.dim() - 1))
        return slots.masked_fill(padding, 0.0), None, None, None
