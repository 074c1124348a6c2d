"""ETA attends to the behaviors that are nearest in Hamming distance."""

from __future__ import annotations

import pytest
import torch
from drawn import LENGTHS, SIZES, D, history_of, read, slow_attention, target_of

from encode.errors import ConfigError
from encode.quality.rivals.eta import Eta, random_planes


def made(**options) -> Eta:
    torch.manual_seed(0)
    return Eta(SIZES, **{"k": 3, "num_bits": 16, **options})


def distance(planes: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> int:
    """How many planes have the two on different sides."""
    return sum(((one @ plane) > 0).item() != ((other @ plane) > 0).item() for plane in planes.T)


@pytest.mark.parametrize(("k", "num_bits"), [(2, 4), (5, 16), (5, 1), (30, 16)])
def test_it_is_attention_to_the_nearest_and_of_those_as_near_to_the_latest(k, num_bits):
    model, history, target = made(k=k, num_bits=num_bits), history_of(LENGTHS, 14), target_of(4)
    found = read(model)[:, :, 0]
    for user, length in enumerate(LENGTHS):
        for place, query in enumerate(target.embedding[user]):
            far = [distance(model.planes, history.embedding[user, i], query) for i in range(length)]
            nearest = sorted(range(length), key=lambda i: (far[i], -i))[:k]
            expected = torch.zeros(D)
            if nearest:
                expected = slow_attention(model.attention, query, history.embedding[user, sorted(nearest)])
            torch.testing.assert_close(found[user, place], expected, atol=1e-6, rtol=1e-5)


def test_the_order_is_exact_for_long_histories():
    """30,000 behaviors in 64 bits: agreement and place share one float."""
    model = made(k=40, num_bits=64)
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(50, D, generator=generator)
    embedding = few[torch.randint(50, (30_000,), generator=generator)]
    embedding.requires_grad_()
    blank = torch.zeros(1, 30_000, dtype=torch.long)
    history = history_of([1], 1)._replace(embedding=embedding[None], mask=blank == 0, item=blank)
    target = target_of(1, 2)
    model.read(model.summarise(history), target).vectors[0, 0].sum().backward()
    reached = embedding.grad.norm(dim=1).nonzero().squeeze(1).tolist()
    far = (((few @ model.planes) > 0) ^ ((target.embedding[0, 0] @ model.planes) > 0)).sum(1)
    by_row = {tuple(row.tolist()): distance.item() for row, distance in zip(few, far, strict=True)}
    rows = [by_row[tuple(row)] for row in embedding.tolist()]
    assert reached == sorted(sorted(range(30_000), key=lambda i: (rows[i], -i))[:40])


def test_hashes_are_in_the_state_and_the_target_is_not():
    model, history = made(), history_of(LENGTHS, 14)
    state = model.summarise(history)
    for i in range(14):
        expected = [((history.embedding[2, i] @ plane) > 0).item() for plane in model.planes.T]
        assert state.bits[2, i].tolist() == expected


def test_planes_agree_as_often_as_the_angle_says():
    """Two vectors at an angle of 60 degrees: a plane passes between them once in three times."""
    planes = random_planes(D, 60_000, 3)
    one, other = torch.zeros(D), torch.zeros(D)
    one[0], other[0], other[1] = 1, 0.5, 0.75**0.5
    apart = ((one @ planes > 0) != (other @ planes > 0)).double().mean().item()
    assert apart == pytest.approx(1 / 3, abs=0.01)


def test_planes_are_fixed_by_the_seed_and_saved_with_the_model():
    first, again = made(), made()
    torch.manual_seed(5)
    assert torch.equal(first.planes, Eta(SIZES, num_bits=16).planes)
    assert "planes" in first.state_dict()
    assert "planes" not in dict(first.named_parameters())
    assert torch.equal(first.planes, again.planes)


def test_more_than_there_is_is_full_attention():
    torch.testing.assert_close(read(made(k=14)), read(made(k=1000, seed=9)))
    assert not torch.allclose(read(made(k=13)), read(made(k=14)))


@pytest.mark.parametrize("options", [{"k": 1}, {"num_bits": 4}, {"num_heads": 4}, {"seed": 1}])
def test_every_switch_does_something(options):
    assert not torch.allclose(read(made()), read(made(**options)))


@pytest.mark.parametrize("options", [{"k": 0}, {"num_bits": 0}, {"num_heads": 5}])
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} is {options[name]}"):
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
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_()]
    found = model.read(model.summarise(history), target)
    assert (found.vectors == 0).all()
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    grads = [leaf.grad for leaf in [*leaves, *model.parameters()] if leaf.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_gradients_reach_every_parameter_and_are_finite_beside_an_empty_history():
    model, history, target = made(), history_of(LENGTHS, 14), target_of(4)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_()]
    found = model.read(model.summarise(history), target)
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(leaf.grad).all() for leaf in [*leaves, *trained])
    assert all((leaf.grad != 0).any() for leaf in [*leaves, *trained])
    assert (history.embedding.grad[~history.mask] == 0).all()
