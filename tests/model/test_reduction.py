"""Both losses by hand, and that training on each alone does what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encode.model.reduction import (
    center_loss,
    draw_triplets,
    dynamic_triplet_loss,
    linear_decoder,
    principal_projection,
    random_projection,
)


def at_angles(*degrees: float) -> torch.Tensor:
    """Vectors in the plane, of different lengths, which must not matter."""
    return torch.stack(
        [
            (1 + place) * torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
            for place, angle in enumerate(degrees)
        ]
    )[None]


def test_dynamic_margin_by_hand():
    """Original: D(a,p) = 1 - cos 60 = 0.5, D(a,n) = 1 - cos 90 = 1, so alpha = 0.5 lambda.

    Projected: D(a,p) = 1 - cos 90 = 1, D(a,n) = 1 - cos 60 = 0.5. L = 1 - 0.5 + 0.5 lambda.
    """
    original, projected = at_angles(0, 60, 90), at_angles(0, 90, 60)
    assert dynamic_triplet_loss(original, projected, 0.5, "dynamic").item() == pytest.approx(0.75)
    assert dynamic_triplet_loss(original, projected, 1.0, "dynamic").item() == pytest.approx(1.0)
    assert dynamic_triplet_loss(original, projected, 0.3, "fixed").item() == pytest.approx(0.8)


def test_the_positive_is_the_one_closer_in_the_original_space():
    original, projected = at_angles(0, 60, 90), at_angles(0, 90, 60)
    swapped = [0, 2, 1]
    loss = dynamic_triplet_loss(original[:, swapped], projected[:, swapped], 0.5, "dynamic")
    assert loss.item() == pytest.approx(0.75)


@pytest.mark.parametrize("margin_weight", [0.0, 0.5, 1.0])
def test_zero_where_distances_agree(margin_weight):
    """The projection keeps every distance: D_h(a,p) - D_h(a,n) = -gap, and alpha = lambda gap <= gap."""
    original = at_angles(0, 20, 110)
    assert dynamic_triplet_loss(original, 3 * original, margin_weight, "dynamic").item() == pytest.approx(0, abs=1e-6)


def test_the_dynamic_margin_asks_for_a_share_of_the_gap():
    """Original gap cos 0 - cos 90 = 1; the projection keeps 0.5 of it: loss 0 up to lambda 0.5, then lambda - 0.5."""
    original, projected = at_angles(0, 0, 90), at_angles(0, 0, 60)
    assert dynamic_triplet_loss(original, projected, 0.5, "dynamic").item() == pytest.approx(0, abs=1e-6)
    assert dynamic_triplet_loss(original, projected, 0.9, "dynamic").item() == pytest.approx(0.4)


def test_semi_hard_triplets_are_in_order_but_not_by_the_margin():
    """Gaps of 1 in the original; the projection keeps 0.5 of one, has turned the other around, and keeps all of one."""
    original = torch.cat([at_angles(0, 0, 90)] * 3)
    projected = torch.cat([at_angles(0, 0, 60), at_angles(0, 90, 60), at_angles(0, 0, 90)])
    losses = [dynamic_triplet_loss(original[i : i + 1], projected[i : i + 1], 0.9, "dynamic").item() for i in range(3)]
    assert losses == pytest.approx([0.4, 0.9 + 0.5, 0])
    found = dynamic_triplet_loss(original, projected, 0.9, "dynamic", semi_hard=True)
    assert found.item() == pytest.approx(0.4 / 3)


def test_by_category_the_one_of_the_anchors_category_is_the_positive():
    """Original gap 0.5 in favor of the first; where the second is of the category, the other order is asked for."""
    original, projected = at_angles(0, 60, 90), at_angles(0, 60, 90)
    for category, expected in (([7, 7, 8], 0), ([7, 8, 7], 0.5 + 0.5), ([7, 8, 9], 0), ([7, 7, 7], 0)):
        found = dynamic_triplet_loss(original, projected, 1.0, "dynamic", category=torch.tensor([category]))
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_equal_others_add_no_loss_but_count_in_the_mean():
    """A history often holds an item twice: then neither other is the positive."""
    original = torch.cat([at_angles(0, 60, 60)[:, [0, 1, 1]], at_angles(0, 60, 90)])
    projected = torch.cat([at_angles(0, 0, 90), at_angles(0, 90, 60)])
    assert dynamic_triplet_loss(original, projected, 0.5, "dynamic").item() == pytest.approx(0.75 / 2)
    assert dynamic_triplet_loss(original, projected, 0.5, "fixed").item() == pytest.approx(1.0 / 2)


def test_only_the_projection_is_taught():
    original = at_angles(0, 60, 90).requires_grad_()
    projection = torch.tensor([[0.0, 1.0], [1.0, 0.5]], requires_grad=True)
    dynamic_triplet_loss(original, original.detach() @ projection, 1.0, "fixed").backward()
    assert original.grad is None
    assert projection.grad.norm() > 0
    kept = at_angles(0, 90, 60).requires_grad_()
    dynamic_triplet_loss(original, kept, 1.0, "dynamic").backward()
    assert original.grad is None
    assert kept.grad.norm() > 0


def test_no_triplets_is_a_loss_of_zero_that_can_be_minimized():
    projected = torch.zeros(0, 3, 2, requires_grad=True)
    loss = dynamic_triplet_loss(torch.zeros(0, 3, 4), projected, 0.5, "dynamic")
    loss.backward()
    assert loss.item() == 0


def test_a_random_projection_keeps_the_expected_squared_norm():
    """The mean over 400 projections of a unit vector: 1, standard error sqrt(2 / 8) / 20 = 0.025."""
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(32, generator=generator), dim=0)
    norms = [(unit @ random_projection(32, 8, generator)).square().sum().item() for _ in range(400)]
    assert np.mean(norms) == pytest.approx(1, abs=0.1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 50), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_triplets_stay_inside_one_history(lengths, num_triplets, seed):
    found = draw_triplets(torch.tensor(lengths), num_triplets, torch.Generator().manual_seed(seed))
    if max(lengths) < 3:
        assert found.shape == (0, 4)
        return
    assert found.shape == (num_triplets, 4)
    for user, *places in found.tolist():
        assert lengths[user] >= 3
        assert all(0 <= place < lengths[user] for place in places)


def test_triplets_reach_every_behavior():
    found = draw_triplets(torch.tensor([2, 5, 3]), 2000, torch.Generator().manual_seed(0))
    for column in (1, 2, 3):
        reached = {(user, place) for user, place in found[:, [0, column]].tolist()}
        assert reached == {(1, place) for place in range(5)} | {(2, place) for place in range(3)}


def test_training_on_the_loss_alone_keeps_the_order_of_distances_better():
    """Behaviors whose variance lies in few of 24 dimensions, which a random projection to 4 cannot know."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(8, 50, 24, generator=generator) * torch.tensor([3.0] * 4 + [0.7] * 20)
    lengths = torch.full((8,), 50)

    def drawn(num_triplets: int) -> torch.Tensor:
        triplets = draw_triplets(lengths, num_triplets, generator)
        return embedding[triplets[:, :1], triplets[:, 1:]]

    projection = random_projection(24, 4, generator).requires_grad_()
    held_out = drawn(4000)

    def agreement() -> float:
        e, h = held_out, held_out @ projection.detach()
        gaps = [(F.cosine_similarity(x[:, 0], x[:, 1]) - F.cosine_similarity(x[:, 0], x[:, 2])).sign() for x in (e, h)]
        return (gaps[0] == gaps[1]).float().mean().item()

    start = agreement()
    optimizer = torch.optim.Adam([projection], lr=0.02)
    for _ in range(200):
        triplets = drawn(256)
        loss = dynamic_triplet_loss(triplets, triplets @ projection, 0.5, "dynamic")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start < 0.85
    assert agreement() > start + 0.05


def test_center_loss_is_the_spread_of_keys_around_their_centers():
    """By definition, sum_i |h_i - c_k(i)|^2 / n of each history, then their mean times s^2 / P; the last has none."""
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(3, 40, 6, generator=generator), dim=2)
    cluster = torch.randint(4, (3, 40), generator=generator)
    counts = [40, 25, 0]
    center, size, expected = torch.zeros(3, 5, 6), torch.zeros(3, 5), 0.0
    for user, count in enumerate(counts):
        for k in range(5):
            own = key[user, :count][cluster[user, :count] == k]
            size[user, k] = len(own)
            if len(own):
                center[user, k] = own.mean(0)
                expected += (own - center[user, k]).square().sum().item() / count
    assert center_loss(center, size, torch.tensor(3.0)).item() == pytest.approx(9 * expected / 3 / 6, rel=1e-5)
    assert center_loss(center[:0], size[:0], torch.tensor(3.0)) == 0


def test_center_loss_moves_keys_to_their_centers_and_leaves_the_scale_alone():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 20, 6, generator=generator, requires_grad=True)
    scale = torch.tensor(5.0, requires_grad=True)
    member = F.one_hot(torch.arange(20) % 4, 4).float().T
    optimizer = torch.optim.Adam([raw, scale], lr=0.05)
    losses = []
    for _ in range(100):
        center = member @ F.normalize(raw, dim=2) / 5
        loss = center_loss(center, torch.full((1, 4), 5.0), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert scale.item() == 5


def test_the_decoder_is_the_least_squares_fit_of_items_as_often_as_they_occur():
    generator = torch.Generator().manual_seed(0)
    key, embedding = torch.randn(40, 3, generator=generator), torch.randn(40, 5, generator=generator)
    count = torch.randint(0, 9, (40,), generator=generator)
    h, e = (table.repeat_interleave(count, 0).double().numpy() for table in (key, embedding))
    expected = np.linalg.lstsq(h - h.mean(0), e - e.mean(0))[0]
    np.testing.assert_allclose(linear_decoder(key, embedding, count.float()).numpy(), expected, atol=1e-4)


def test_a_decoder_of_keys_in_a_plane_or_of_nothing_is_finite():
    flat = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0]])
    assert linear_decoder(flat, torch.eye(3), torch.ones(3)).isfinite().all()
    assert not linear_decoder(flat, torch.eye(3), torch.zeros(3)).any()


def test_principal_projection_keeps_what_varies_most():
    """Against numpy's SVD of the embeddings as often as they occur, up to signs."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(30, 6, generator=generator) * torch.tensor([5.0, 1, 3, 0.1, 2, 0.5])
    count = torch.randint(0, 9, (30,), generator=generator)
    found = principal_projection(embedding, count.float(), 3)
    repeated = embedding.repeat_interleave(count, 0).numpy()
    expected = np.linalg.svd(repeated, full_matrices=False)[2][:3].T
    np.testing.assert_allclose(np.abs(found.numpy()), np.abs(expected), atol=1e-4)
