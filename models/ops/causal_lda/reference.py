"""The definition of causal LDA: one user, one event at a time, in float64. Slow; the judge of the fast form."""

from __future__ import annotations

import torch

from elastic_rec.models.ops.causal_lda.partial import Partial


def aggregate(query_HKd, key_THd, value_THe, times_s_T, decay_per_s_HK, offsets_B1, chunk, start=None) -> Partial:
    """The recurrence; a row for each user's start, each end of a full chunk, and the end of an open one."""
    query_HKd, key_THd, value_THe, decay_per_s_HK = (
        t.double() for t in (query_HKd, key_THd, value_THe, decay_per_s_HK)
    )
    (H, K, _), e = query_HKd.shape, value_THe.shape[-1]
    rows = []
    for b, (first, end) in enumerate(zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True)):
        if start is None:
            m_HK, l_HK, a_HKe = torch.full((H, K), -1e30).double(), torch.zeros(H, K).double(), torch.zeros(H, K, e)
            a_HKe, clock = a_HKe.double(), times_s_T.new_zeros(())
        else:
            m_HK, l_HK, a_HKe, clock = (tensor[b] for tensor in start)
            m_HK, l_HK, a_HKe = m_HK.double(), l_HK.double(), a_HKe.double()
        rows.append((m_HK, l_HK, a_HKe, clock))
        for t in range(first, end):
            faded_HK = m_HK - decay_per_s_HK * (times_s_T[t] - clock).double()
            score_HK = (query_HKd * key_THd[t][:, None]).sum(-1)
            m_HK = torch.maximum(faded_HK, score_HK).detach()
            old_HK, new_HK = (faded_HK - m_HK).exp(), (score_HK - m_HK).exp()
            l_HK = l_HK * old_HK + new_HK
            a_HKe = a_HKe * old_HK[..., None] + new_HK[..., None] * value_THe[t][:, None]
            clock = times_s_T[t]
            if (t + 1 - first) % chunk == 0 or t + 1 == end:
                rows.append((m_HK, l_HK, a_HKe, clock))
    return Partial(*(torch.stack(column) for column in zip(*rows, strict=True)))


def dispatch(
    query_THd, expert_key_RHKd, expert_value_RHKe, key_THd, value_THe, bias_HW, offsets_B1, chunk
) -> torch.Tensor:
    """One softmax per event over [experts at its chunk's start ; events of the chunk before, and of its own]."""
    out, boundary = [], 0
    for first, end in zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True):
        for t in range(first, end):
            chunk_start = first + (t - first) // chunk * chunk
            window = torch.arange(max(first, chunk_start - chunk), t + 1)
            r = boundary + (t - first) // chunk
            key_HJd = torch.cat([expert_key_RHKd[r], key_THd[window].transpose(0, 1)], dim=1)
            value_HJe = torch.cat([expert_value_RHKe[r], value_THe[window].transpose(0, 1)], dim=1)
            bias_HJ = torch.cat([torch.zeros_like(bias_HW[:, :1]).expand(-1, expert_key_RHKd.shape[2]),
                                 bias_HW[:, t - window]], dim=1)  # fmt: skip
            weights_HJ = ((key_HJd * query_THd[t][:, None]).sum(-1) + bias_HJ).softmax(-1)
            out.append((weights_HJ[..., None] * value_HJe).sum(1))
        boundary += 1 + -(-(end - first) // chunk)
    return torch.stack(out) if out else torch.zeros_like(value_THe)
