"""The tile layout: nothing lost, nothing mixed, little padding."""

import torch

from elastic_rec.models.tiles import TileLayout

LENGTHS = [0, 1, 7, 64, 129, 0, 32]


def build(lengths, tile=32):
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    return TileLayout.build(offsets_B1, int(offsets_B1[-1]), tile)


def test_round_trip_and_owner():
    layout = build(LENGTHS)
    tokens_TD = torch.randn(sum(LENGTHS), 3)
    tiles_NCD = layout.to_tiles(tokens_TD)
    assert torch.equal(layout.to_tokens(tiles_NCD), tokens_TD)
    assert torch.equal(tiles_NCD[layout.valid_NC], tokens_TD)  # valid slots in order are the tokens in order
    user_NC = layout.to_tiles(layout.user_T)  # padding too holds an event of the tile's own user
    assert torch.equal(user_NC, layout.user_N[:, None].expand_as(user_NC))


def test_tile_count_is_the_sum_over_users():
    for tile in (1, 2, 32, 200):
        layout = build(LENGTHS, tile)
        assert layout.user_N.numel() == sum(-(-n // tile) for n in LENGTHS)
        assert layout.user_N.numel() <= sum(LENGTHS) / tile + len(LENGTHS)


def test_padding_sends_no_gradient():
    layout = build([3, 0, 2], tile=4)
    tokens_TD = torch.randn(5, 2, requires_grad=True)
    layout.to_tiles(tokens_TD).sum().backward()
    assert torch.equal(tokens_TD.grad, torch.ones(5, 2))

    tiles_NCD = torch.randn(2, 4, 2, requires_grad=True)
    layout.to_tokens(tiles_NCD).sum().backward()
    assert torch.equal(tiles_NCD.grad, layout.valid_NC[..., None].expand(2, 4, 2).float())


def test_gradients_to_second_order():
    layout = build([3, 0, 2], tile=2)
    tokens_TD = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    tiles_NCD = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layout.to_tokens(layout.to_tiles(x) ** 2), (tokens_TD,))
    assert torch.autograd.gradcheck(layout.to_tokens, (tiles_NCD,))


def test_no_tokens():
    layout = build([0, 0])
    assert layout.to_tiles(torch.randn(0, 3)).shape == (0, 32, 3)
    assert layout.to_tokens(torch.randn(0, 32, 3)).shape == (0, 3)
