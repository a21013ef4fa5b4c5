"""The state of a user: all that the causal tower must know of past events, the same number of bytes for any history.

Legend: B users, L layers, H heads, K experts, d = D/H, C events per chunk, W = 2C slots for events kept one by one.
Running sums end where the kept events begin (timeline.py draws it).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from elastic_rec.models.ops.causal_lda import Partial
from elastic_rec.models.towers.config import TowerConfig

VERSION = 2
MAGIC = b"elastic\0"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class StateError(ValueError):
    """A state that this model can't continue; the message says why and what to do."""


@dataclass(frozen=True)
class UserState:
    """Make it with `tower.init_state`, continue it with `tower.step`, store it with `to_bytes`.

    count_B int64: events so far. clock_s_B int64: time of the newest event in the sums. times_s_BW int64: of the kept.
    max_BLHK float64, norm_BLHK and sum_BLHKd float32: a Partial per layer. Always full precision: what one event adds
    to a long sum is smaller than what a half-precision number resolves.
    moments_Brf float32: sums of all events, the kept ones too (towers/elastic/moments.py).
    newest_BD float32: the newest event after all layers. kept_BLW2Hd: keys and values of the kept events, in the
    dtype that the state was made with. Unused slots are zeros.
    """

    fingerprint: str
    count_B: torch.Tensor
    clock_s_B: torch.Tensor
    times_s_BW: torch.Tensor
    max_BLHK: torch.Tensor
    norm_BLHK: torch.Tensor
    sum_BLHKd: torch.Tensor
    moments_Brf: torch.Tensor
    newest_BD: torch.Tensor
    kept_BLW2Hd: torch.Tensor

    @staticmethod
    def empty(
        num_users: int, config: TowerConfig, *, fingerprint: str, dtype: torch.dtype = torch.float32, device=None
    ) -> UserState:
        """States of users without events. ValueError: a dtype that states can't have."""
        if dtype not in DTYPES:
            raise ValueError(f"a state's dtype can't be {dtype}: choose one of {DTYPES}")
        B, L, H, K, W = num_users, config.layers, config.heads, config.experts, 2 * config.chunk
        d = config.width // H
        sums = Partial.empty(B * L, H, K, d, device=device)
        return UserState(
            fingerprint=fingerprint,
            count_B=torch.zeros(B, dtype=torch.int64, device=device),
            clock_s_B=torch.zeros(B, dtype=torch.int64, device=device),
            times_s_BW=torch.zeros(B, W, dtype=torch.int64, device=device),
            max_BLHK=sums.max_RHK.view(B, L, H, K),
            norm_BLHK=sums.norm_RHK.view(B, L, H, K),
            sum_BLHKd=sums.sum_RHKe.view(B, L, H, K, d),
            moments_Brf=torch.zeros(B, config.moments + 1, config.width + 1, device=device),
            newest_BD=torch.zeros(B, config.width, device=device),
            kept_BLW2Hd=torch.zeros(B, L, W, 2, H, d, dtype=dtype, device=device),
        )

    @property
    def num_users(self) -> int:
        """Users, B."""
        return self.count_B.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values kept."""
        return self.kept_BLW2Hd.dtype

    @property
    def newest_s_B(self) -> torch.Tensor:
        """(B,) int64: time of each user's newest event, 0 without one. It is the last of the kept events."""
        kept_B = num_kept(self.count_B, self.times_s_BW.shape[1] // 2)
        return self.times_s_BW.gather(1, (kept_B - 1).clamp_min(0)[:, None])[:, 0]

    def sums(self, layer: int) -> Partial:
        """The running sums of a layer, B rows."""
        return Partial(self.max_BLHK[:, layer], self.norm_BLHK[:, layer], self.sum_BLHKd[:, layer], self.clock_s_B)

    def kept(self, layer: int) -> torch.Tensor:
        """Keys and values (B, W, 2, H, d)."""
        return self.kept_BLW2Hd[:, layer]

    def rows(self, index: torch.Tensor) -> UserState:
        """The states of some users, in any order."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def detach(self) -> UserState:
        """The same without a graph."""
        return self._each(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> UserState:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(states: list[UserState]) -> UserState:
        """States of several batches of users as one."""
        return UserState(
            states[0].fingerprint,
            *(torch.cat([getattr(state, name) for state in states]) for name in _tensor_names()),
        )

    def next(self, *, count_B, newest_BD, times_s_E, layers, moments_Brf, place_BW, empty_BW) -> UserState:
        """layers: per layer its sums (B rows), query, key, value (E, 3, H, d). place_BW: where on E the kept stand."""
        place_X, empty_BLW1 = place_BW.flatten(), empty_BW[:, None, :, None, None, None]
        B, W = place_BW.shape
        if times_s_E.numel():
            rows = [qkv_E3Hd.index_select(0, place_X)[:, 1:].to(self.dtype) for _, qkv_E3Hd in layers]
            kept = torch.stack([row_X2Hd.view(B, W, *row_X2Hd.shape[1:]) for row_X2Hd in rows], dim=1)
            kept, times_s_BW = kept.masked_fill(empty_BLW1, 0.0), times_s_E[place_BW].masked_fill(empty_BW, 0)
        else:
            kept, times_s_BW = self.kept_BLW2Hd, self.times_s_BW
        return UserState(
            fingerprint=self.fingerprint,
            count_B=count_B,
            clock_s_B=layers[0][0].clock_R,
            times_s_BW=times_s_BW,
            max_BLHK=torch.stack([sums.max_RHK for sums, *_ in layers], dim=1),
            norm_BLHK=torch.stack([sums.norm_RHK for sums, *_ in layers], dim=1).to(self.norm_BLHK.dtype),
            sum_BLHKd=torch.stack([sums.sum_RHKe for sums, *_ in layers], dim=1).to(self.sum_BLHKd.dtype),
            moments_Brf=moments_Brf.to(self.moments_Brf.dtype),
            newest_BD=newest_BD.to(self.newest_BD.dtype),
            kept_BLW2Hd=kept,
        )

    def to_bytes(self) -> np.ndarray:
        """(B, S) uint8, one self-contained row per user, S the same for every history: row.tobytes() is one state."""
        head = MAGIC + bytes([VERSION, DTYPES.index(self.dtype), 0, 0, 0, 0, 0, 0]) + bytes.fromhex(self.fingerprint)
        parts = [np.broadcast_to(np.frombuffer(head, dtype=np.uint8), (self.num_users, len(head)))]
        for name in _tensor_names():
            tensor = getattr(self, name).detach().cpu().contiguous()
            parts.append(tensor.flatten(1).view(torch.uint8).numpy() if tensor.dim() > 1 else _bytes_1(tensor))
        return np.concatenate(parts, axis=1)

    @staticmethod
    def from_bytes(rows: np.ndarray, tower: nn.Module) -> UserState:
        """rows (B, S) uint8 as `to_bytes` gave them. StateError: another model's, another version's, or damaged."""
        rows = np.ascontiguousarray(rows, dtype=np.uint8)
        if rows.ndim != 2 or rows.shape[1] < 32 or (rows[:, :8] != np.frombuffer(MAGIC, dtype=np.uint8)).any():
            raise StateError(f"an array of shape {rows.shape} holds no user states: give rows that to_bytes wrote")
        if not len(rows):
            return tower.init_state(0)
        if (rows[:, :32] != rows[0, :32]).any():
            raise StateError("states of several models, versions or dtypes in one batch: read them separately")
        version, code = int(rows[0, 8]), int(rows[0, 9])
        if version != VERSION or code >= len(DTYPES):
            raise StateError(
                f"states of version {version}, dtype {code}; this code reads version {VERSION}: encode the users again"
            )
        _check_fingerprint(rows[0, 16:32].tobytes().hex(), tower.fingerprint())
        state = tower.init_state(len(rows), dtype=DTYPES[code])
        size = 32 + sum(
            getattr(state, name)[0].numel() * getattr(state, name).element_size() for name in _tensor_names()
        )
        if rows.shape[1] != size:
            raise StateError(
                f"states of {rows.shape[1]} bytes where this model's have {size}: they are cut off or damaged"
            )
        found, at = {}, 32
        for name in _tensor_names():
            like = getattr(state, name)
            width = like[0].numel() * like.element_size()
            piece = torch.from_numpy(rows[:, at : at + width].copy()).view(like.dtype)
            found[name] = piece.view(like.shape).to(like.device)
            at += width
        return replace(state, **found)

    def _each(self, function) -> UserState:
        return UserState(self.fingerprint, *(function(getattr(self, name)) for name in _tensor_names()))


def num_kept(count_B: torch.Tensor, chunk: int) -> torch.Tensor:
    """How many of a user's newest events a state keeps one by one."""
    return torch.where(count_B < chunk, count_B, chunk + count_B % chunk)


def check_state(state: UserState, *, num_users: int, fingerprint: str | None) -> None:
    """StateError: not one row per user, or another model's (fingerprint None: any)."""
    if state.num_users != num_users:
        raise StateError(f"states of {state.num_users} users for events of {num_users}: give one state per user")
    if fingerprint is not None:
        _check_fingerprint(state.fingerprint, fingerprint)


class Fingerprint:
    """Hash of a tower's configuration and dense weights, computed again only after a weight was written to."""

    def __init__(self, tower: nn.Module):
        self.tower, self.key, self.value = tower, None, ""

    def __call__(self) -> str:
        tower = self.tower
        dense = [(name, p) for name, p in tower.named_parameters() if not name.startswith("memory.bank.")]
        key = tuple((p.data_ptr(), p._version) for _, p in dense)
        if key != self.key:
            digest = hashlib.blake2b(repr((asdict(tower.config), asdict(tower.memory_config))).encode(), digest_size=16)
            for name, p in dense:
                digest.update(name.encode())
                digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self.key, self.value = key, digest.hexdigest()
        return self.value


def _check_fingerprint(found: str, wanted: str) -> None:
    if found != wanted:
        raise StateError(
            f"these states were made by model {found[:8]}, this is model {wanted[:8]}, with other weights or "
            "configuration: load that model, or encode the users again from their whole histories"
        )


def _tensor_names() -> list[str]:
    return [field.name for field in fields(UserState) if field.name != "fingerprint"]


def _bytes_1(tensor: torch.Tensor) -> np.ndarray:
    return tensor[:, None].view(torch.uint8).numpy()
