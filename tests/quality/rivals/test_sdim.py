"""SDIM reads sums that were made before any target was known."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import LENGTHS, SIZES, D, history_of, read, target_of

from encode.errors import ConfigError
from encode.quality.rivals.sdim import Buckets, Sdim


def made(**options) -> Sdim:
    torch.manual_seed(0)
    return Sdim(SIZES, **{"num_groups": 5, "num_bits": 2, **options})


def collide(model: Sdim, group: int, one: torch.Tensor, other: torch.Tensor) -> bool:
    planes = model.planes[:, group * model.num_bits : (group + 1) * model.num_bits].T
    return all(((one @ plane) > 0).item() == ((other @ plane) > 0).item() for plane in planes)


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(("num_groups", "num_bits"), [(5, 2), (1, 1), (3, 4)])
def test_it_is_the_mean_over_groups_of_what_collides(num_groups, num_bits, l2_norm):
    model = made(num_groups=num_groups, num_bits=num_bits, l2_norm=l2_norm)
    history, target = history_of(LENGTHS, 14), target_of(4)
    found = read(model)[:, :, 0]
    for user, length in enumerate(LENGTHS):
        for place, query in enumerate(target.embedding[user]):
            expected = torch.zeros(D)
            for group in range(num_groups):
                total = torch.zeros(D)
                for i in range(length):
                    if collide(model, group, history.embedding[user, i], query):
                        total = total + history.embedding[user, i]
                if l2_norm and total.norm() > 0:
                    total = total / total.norm()
                expected = expected + total / num_groups
            torch.testing.assert_close(found[user, place], expected, atol=1e-5, rtol=1e-5)


def test_the_state_is_small_and_can_be_added_to():
    """Its size is that of the buckets whatever L, and the state of a whole history is the sum over its parts."""
    model, history = made(), history_of(LENGTHS, 14)
    assert model.target_free
    state = model.summarise(history)
    assert state.total.shape == (4, 5, 4, D)
    early = history.mask & (torch.arange(14) < 4)
    parts = [model.summarise(history._replace(mask=mask)).total for mask in (early, history.mask & ~early)]
    torch.testing.assert_close(parts[0] + parts[1], state.total)
    assert (parts[1] != 0).any()


def test_each_behavior_is_in_one_bucket_of_each_group():
    model, history = made(l2_norm=False), history_of([9], 9)
    total = model.summarise(history).total
    expected = history.embedding.sum(1)[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(total.sum(2), expected)


def test_only_the_direction_of_the_target_counts():
    model, history, target = made(), history_of([9], 9), target_of(1)
    state = model.summarise(history)
    near, far = (model.read(state, target._replace(embedding=target.embedding * by)).vectors for by in (1, 100))
    assert torch.equal(near, far)
    assert not torch.equal(near, model.read(state, target._replace(embedding=-target.embedding)).vectors)


def test_in_expectation_it_weighs_by_the_angle_to_the_power_of_the_bits():
    """60 degrees and 3 bits: (1 - 1/3)^3 of the groups collide."""
    model = Sdim(SIZES, num_groups=20_000, num_bits=3, l2_norm=False)
    history, target = history_of([1], 1), target_of(1, 2)
    history.embedding[0, 0] = target.embedding[0, 0] = 0
    history.embedding[0, 0, 0] = 1
    target.embedding[0, 0, 0], target.embedding[0, 0, 1] = 0.5, 0.75**0.5
    found = model.read(model.summarise(history), target).vectors[0, 0, 0]
    assert found[0].item() == pytest.approx((2 / 3) ** 3, abs=0.01)
    assert found[1:].tolist() == [0] * (D - 1)


def test_each_group_has_unit_length_or_none():
    model = made(num_groups=1)
    lengths = read(model)[:, :, 0].norm(dim=2).flatten().tolist()
    assert all(math.isclose(length, 1, abs_tol=1e-5) or length == 0 for length in lengths)
    assert any(length > 0 for length in lengths)


def test_a_target_reads_from_its_own_history():
    total = torch.arange(2 * 5 * 4.0).view(2, 5, 4, 1).expand(-1, -1, -1, D)
    found = made(l2_norm=False).read(Buckets(total), target_of(2)).vectors[:, :, 0, 0]
    torch.testing.assert_close(found[1] - found[0], torch.full((6,), 20.0))


@pytest.mark.parametrize("options", [{"num_groups": 6}, {"num_bits": 3}, {"l2_norm": False}, {"seed": 1}])
def test_every_switch_does_something(options):
    assert not torch.allclose(read(made()), read(made(**options)))


@pytest.mark.parametrize("options", [{"num_groups": 0}, {"num_bits": 0}])
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"Sdim: {name} is 0"):
        made(**options)


# --- padding, other users, empty histories ------------------------------------------------------------------


def test_neither_padding_nor_other_users_change_anything():
    model = made()
    together = read(model)
    torch.testing.assert_close(read(model, longest=70), together, atol=1e-6, rtol=1e-5)
    alone = torch.cat([read(model, [length], max(length, 1)) for length in LENGTHS])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("longest", [0, 3])
def test_an_empty_history_reads_zero_with_finite_gradients(longest):
    model, history, target = made(), history_of([0, 0], longest), target_of(2)
    history.embedding.requires_grad_()  # a target is only hashed
    found = model.read(model.summarise(history), target)
    assert (found.vectors == 0).all()
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    assert torch.isfinite(history.embedding.grad).all()


def test_gradients_reach_the_embeddings_and_are_finite_beside_an_empty_history():
    model, history, target = made(), history_of(LENGTHS, 14), target_of(4)
    history.embedding.requires_grad_()  # a target is only hashed
    found = model.read(model.summarise(history), target)
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    assert not list(model.parameters())
    assert torch.isfinite(history.embedding.grad).all()
    assert (history.embedding.grad != 0).any()
    assert (history.embedding.grad[~history.mask] == 0).all()
