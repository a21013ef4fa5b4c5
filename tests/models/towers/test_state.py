"""User states: any split into steps is one whole pass, the bytes don't grow, and a foreign state is refused."""

import itertools

import numpy as np
import pytest
import torch
from towers import LENGTHS, C, D, events, make_tower, run

from elastic_rec.models.towers.elastic.state import StateError, UserState

ONE_BY_ONE = [[i] for i in range(1, 38)]


@pytest.mark.parametrize(("layers", "memory", "half_life"), [(1, False, True), (3, True, True), (3, False, False)])
@pytest.mark.parametrize(
    "cuts",
    [
        ONE_BY_ONE,
        [[C - 1], [C], [C + 1], [2 * C], [2 * C], [3 * C + 2], [37]],
        [np.random.default_rng(0).integers(0, 38, 7).tolist(), [37]],
        [[0], [37], [37]],
    ],
)
def test_any_split_is_the_whole_pass(cuts, layers, memory, half_life):
    tower = make_tower(layers=layers, memory=memory, half_life=half_life).eval()
    batch = events(LENGTHS)
    with torch.no_grad():
        whole = tower(*batch)
        tokens, out, state = run(tower, *batch, cuts, through_bytes=True)
        newest, newest_state = run(tower, *batch, cuts, all_positions=False)[1:]
    assert torch.equal(newest_state.kept_BLW2Hd, state.kept_BLW2Hd) and newest.tokens is None
    torch.testing.assert_close(newest.user_embedding, out.user_embedding, rtol=1e-5, atol=1e-6)
    assert state.count_B.tolist() == LENGTHS
    for got, want in (
        (tokens, whole.tokens),
        (out.user_embedding, whole.user_embedding),
        (out.interests, whole.interests),
    ):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("chunk", [C, 32])
def test_50000_events_in_steps_against_float64(chunk):
    """Three layers in float32, in random steps: 1e-5 relative to one float64 pass."""
    tower = make_tower(layers=3, chunk=chunk).eval()
    lengths = [50_000 if chunk == 32 else 5_000, 700]
    batch = events(lengths)
    cuts = [[c] for c in sorted(np.random.default_rng(0).integers(1, lengths[0], 30).tolist())] + [[lengths[0]]]
    with torch.no_grad():
        tokens, out, _ = run(tower, *batch, cuts)
        single = tower(*batch)
        exact = tower.double()(batch[0].double(), *batch[1:])
    for name, got in (("steps", tokens), ("one pass", single.tokens)):
        error = (got - exact.tokens).abs().max() / exact.tokens.abs().max()
        print(f"{name}, chunk {chunk}: {error:.1e}")
        assert error <= 1e-5
    assert (out.interests - exact.interests).abs().max() <= 1e-5 * exact.interests.abs().max()


def test_gradients_run_through_the_state():
    tower = make_tower(layers=2)
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS)
    leaves = [tokens_TD.requires_grad_(True), *tower.parameters()]
    probe = torch.randn(tokens_TD.shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((tower(tokens_TD, offsets_B1, times_s_T).tokens * probe).sum(), leaves)
    tokens, _, state = run(tower, tokens_TD, offsets_B1, times_s_T, [[3], [C], [2 * C + 1], [20], [37]])
    for a, b in zip(torch.autograd.grad((tokens * probe).sum(), leaves, retain_graph=True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * b.abs().max().item())
    assert state.sum_BLHKd.requires_grad and not state.detach().sum_BLHKd.requires_grad
    half = run(tower, tokens_TD, offsets_B1, times_s_T, [[20]])[2].detach()
    tail_B1 = torch.tensor([0, *[0] * (len(LENGTHS) - 1), 17])
    out, _ = tower.step(tokens_TD[-17:], tail_B1, times_s_T[-17:], half)
    (grad,) = torch.autograd.grad(out.tokens.sum(), tokens_TD)
    assert grad[-17:].abs().sum() > 0 and grad[:-17].abs().sum() == 0


def test_bytes_do_not_grow():
    tower = make_tower().eval()
    sizes = set()
    for length in (0, 1, C, 100, 3001):
        with torch.no_grad():
            state = run(tower, *events([length]), [[length]])[2]
        sizes.add(len(state.to_bytes()[0].tobytes()))
    assert len(sizes) == 1
    half = len(tower.init_state(1, dtype=torch.bfloat16).to_bytes()[0])
    assert 0 < sizes.pop() - half == 2 * 2 * C * 2 * D * 2  # layers, slots, key and value, width, bytes saved each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_round_trip_and_storage_types(dtype):
    tower = make_tower(layers=2, memory=False).eval()  # with one, a rounded sum may ask for another slot
    batch = events(LENGTHS)
    with torch.no_grad():
        whole = tower(*batch)
        tokens, _, state = run(tower, *batch, ONE_BY_ONE, dtype=dtype)
        back = UserState.from_bytes(state.to_bytes(), tower)
    for name, tensor in vars(state).items():
        assert name == "fingerprint" or torch.equal(tensor, getattr(back, name)), name
    assert back.dtype == dtype and back.norm_BLHK.dtype == torch.float32
    relative = ((tokens - whole.tokens).abs().max() / whole.tokens.abs().max()).item()
    print(f"{dtype}: off by {relative:.1e}")
    allowed = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert relative <= allowed


def test_half_precision_does_not_freeze_a_long_history():
    """4000 events of one kind, then 4000 of another: the sums still move, as far as they do in float32."""
    tower = make_tower(layers=1, half_life=False).eval()
    tokens_TD, offsets_B1, times_s_T = events([8000])
    tokens_TD[4000:] = 0.1 * tokens_TD[4000:] + tokens_TD[0]
    cuts = [[c] for c in range(100, 8001, 100)]
    with torch.no_grad():
        exact, half = (
            run(tower, tokens_TD, offsets_B1, times_s_T, cuts, dtype=d)[2] for d in (torch.float32, torch.bfloat16)
        )
        early = run(tower, tokens_TD, offsets_B1, times_s_T, cuts[:40])[2]
    means = [state.sums(0).mean() for state in (exact, half, early)]
    moved = (means[0] - means[2]).abs().max()
    assert moved > 0.05 and (means[1] - means[0]).abs().max() < 0.02 * moved


def test_users_can_be_reordered_and_joined():
    tower = make_tower().eval()
    batch = events(LENGTHS)
    with torch.no_grad():
        state = run(tower, *batch, [[20]])[2]
        order = torch.tensor([6, 0, 5, 1])
        joined = UserState.cat([state.rows(order[:2]), state.rows(order[2:])])
        out, after = tower.step(batch[0][-17:], torch.tensor([0, 17, 17, 17, 17]), batch[2][-17:], joined)
        whole = tower(*batch)
    torch.testing.assert_close(
        out.user_embedding, whole.user_embedding[order], rtol=1e-5, atol=1e-5
    )  # also of users without new ones
    torch.testing.assert_close(out.interests, whole.interests[order], rtol=1e-5, atol=1e-5)
    assert after.count_B.tolist() == [37, 0, 9, 1]
    assert torch.equal(after.rows(torch.tensor([2])).kept_BLW2Hd, joined.rows(torch.tensor([2])).kept_BLW2Hd)


def test_no_new_events_at_all_changes_no_byte():
    tower = make_tower().eval()
    for lengths in (LENGTHS, [0, 0]):
        batch = events(lengths)
        with torch.no_grad():
            _, out, state = run(tower, *batch, [[37]])
            nothing = torch.zeros(len(lengths) + 1, dtype=torch.int64)
            again, same = tower.step(torch.zeros(0, D), nothing, nothing[:0], state)
        assert (same.to_bytes() == state.to_bytes()).all()
        torch.testing.assert_close(again.user_embedding, out.user_embedding, rtol=1e-6, atol=1e-6)


def test_foreign_and_damaged_states_are_refused():
    tower = make_tower().eval()
    with torch.no_grad():
        state = run(tower, *events([9, 3]), [[9]])[2]
    rows = state.to_bytes()
    retrained, wider = make_tower().eval(), make_tower(chunk=8).eval()
    assert retrained.fingerprint() == tower.fingerprint()  # same configuration and weights: the same model
    with torch.no_grad():
        retrained.stack.layers[1].out.weight[3, 5] += 1e-3
    for other in (retrained, wider, make_tower(memory=False)):
        assert other.fingerprint() != tower.fingerprint()
        with pytest.raises(StateError, match=r"made by model \w{8}, this is model \w{8}.*encode the users again"):
            UserState.from_bytes(rows, other)
    nothing = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(StateError, match="made by model"):
        retrained.step(torch.zeros(0, D), nothing, nothing[:0], state)
    retrained.train().step(torch.zeros(0, D), nothing, nothing[:0], state)  # windows of a long history in training
    with pytest.raises(StateError, match="states of 2 users for events of 3"):
        tower.step(torch.zeros(0, D), torch.zeros(4, dtype=torch.int64), nothing[:0], state)

    newer, mixed = rows.copy(), rows.copy()
    newer[:, 8], mixed[1, 20] = 3, mixed[1, 20] + 1
    for damaged, message in (
        (newer, "version 3, dtype 0; this code reads version 2"),
        (mixed, "several models"),
        (rows[:, :-4], "cut off or damaged"),
        (np.zeros((2, 99), np.uint8), "holds no user states"),
    ):
        with pytest.raises(StateError, match=message):
            UserState.from_bytes(damaged, tower)
    with pytest.raises(ValueError, match=r"can't be torch.int8"):
        tower.init_state(1, dtype=torch.int8)
    assert UserState.from_bytes(rows[:0], tower).num_users == 0


def test_times_of_steps_are_those_of_the_whole_pass():
    """Half-lives and gaps run on across steps: shifting all times changes nothing, stretching one gap does."""
    tower = make_tower().eval()
    tokens_TD, offsets_B1, times_s_T = events([30])
    with torch.no_grad():
        first, shifted, stretched = (
            run(tower, tokens_TD, offsets_B1, times, [[13], [30]])[1].user_embedding
            for times in (times_s_T, times_s_T + 10**8, times_s_T + 10**8 * (torch.arange(30) >= 13))
        )
    assert torch.equal(first, shifted)
    assert (first - stretched).abs().max() > 1e-3


def test_steps_of_all_sizes_up_to_two_chunks():
    """Every pair (events before, new events) around the edges of chunks."""
    tower = make_tower(layers=2).eval()
    batch = events([4 * C])
    with torch.no_grad():
        whole = tower(*batch).tokens
        for before, new in itertools.product(range(2 * C + 2), range(1, 2 * C)):
            tokens = run(tower, *batch, [[before], [before + new]])[0][: before + new]
            assert (tokens - whole[: before + new]).abs().max() <= 1e-5 * whole.abs().max(), (before, new)
