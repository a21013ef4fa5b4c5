"""Best r of each half, r^2 sums, best r of those; any device, gradients by autograd."""

from __future__ import annotations

import torch


def topk(query_QHd: torch.Tensor, subkeys_H2nh: torch.Tensor, top_r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fast form: the best of both halves, then of their pairs."""
    Q = query_QHd.shape[0]
    H, _, n, h = subkeys_H2nh.shape
    halves_YQh = query_QHd.view(Q, H * 2, h).transpose(0, 1)  # Y = H*2, one product per head and half
    scores_YQn = torch.bmm(halves_YQh, subkeys_H2nh.reshape(H * 2, n, h).transpose(1, 2))
    best_YQr, index_YQr = scores_YQn.topk(top_r, dim=-1)
    best_H2Qr, index_H2Qr = best_YQr.view(H, 2, Q, top_r), index_YQr.view(H, 2, Q, top_r)

    sums_HQrr = best_H2Qr[:, 0, :, :, None] + best_H2Qr[:, 1, :, None, :]
    slots_HQrr = index_H2Qr[:, 0, :, :, None] * n + index_H2Qr[:, 1, :, None, :]
    scores_HQr, pick_HQr = sums_HQrr.flatten(-2).topk(top_r, dim=-1)
    slot_ids_HQr = slots_HQrr.flatten(-2).gather(-1, pick_HQr)
    return slot_ids_HQr.transpose(0, 1), scores_HQr.transpose(0, 1)
