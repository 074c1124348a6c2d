"""What the rivals read is what the field's own code reads, given the same embeddings and weights.

FuxiCTR 2.3.10 holds the reference models of LongCTR. Here each of them runs whole; what its long-term part returns is
caught on the way, and so are gradients. It is not among the requirements, since all that it asks for to prepare data
(ray, h5py) is large and not needed here: `pip install --no-deps fuxictr==2.3.10`.

Where the two are not the same, and what is compared then:

- SIM, soft: theirs multiplies the scores of padding by 0 instead of leaving it out, so that padding pushes out
  behaviors with a negative score. Ours never picks padding. Compared without padding, and shown to differ only where
  padding gets in. In ours U_r is divided by the number of behaviors; time gaps, which theirs has not, are left out.
- ETA: of behaviors at the same distance theirs takes any, ours the latest. Compared where there is no such choice.
- TWIN: their cross features fail for histories of more than one behavior. Compared without.
- A user without behaviors: theirs takes the mean of the padding, ours zero, in SIM, ETA and TWIN. Not compared.
- DIN: ours has no Dice. Compared with ReLU.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.attention import DinUnit
from encode.quality.rivals.eta import Eta
from encode.quality.rivals.sdim import Sdim
from encode.quality.rivals.sim import SimSoft
from encode.quality.rivals.twin import Twin

pytest.importorskip("fuxictr", reason="needs: pip install --no-deps fuxictr==2.3.10")

D, L, T, K = 8, 12, 4, 5
PADDED, FULL = [12, 7, 3, 9], [12, 12, 12, 12]
SIZES = Sizes(num_items=2, num_categories=2, num_kinds=1, embedding_dim=D, projected_dim=6)


@pytest.fixture(scope="module", autouse=True)
def _without_its_preparation_of_data():
    """Models import the package that prepares data, and with it ray and h5py, for one function that none calls."""
    preprocess, tokenizer = ModuleType("fuxictr.preprocess"), ModuleType("fuxictr.preprocess.tokenizer")
    tokenizer.load_pretrain_emb = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, preprocess.__name__, preprocess)
        patch.setitem(sys.modules, tokenizer.__name__, tokenizer)
        yield


class Case:
    """Histories, each with T targets, for ours; the same as one row a target, as theirs takes them."""

    def __init__(self, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.lengths = lengths
        self.table = torch.randn(len(lengths) * (L + T), D, generator=generator)
        self.mask = torch.arange(L) < torch.tensor(lengths)[:, None]
        rows = torch.arange(len(self.table)).view(len(lengths), L + T)
        self.behaviors, self.targets = rows.split([L, T], 1)
        self.weight = torch.randn(len(lengths), T, D, generator=generator)

    def ours(self, model) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read, [G, T, M, D], and the gradient of its weighted first vector for the embeddings."""
        table = self.table.clone().requires_grad_()
        blank, none = torch.zeros_like(self.behaviors), torch.zeros(len(self.lengths), L)
        embedding = table[self.behaviors] * self.mask[..., None]
        history = History(embedding, none[..., None], self.mask, blank, blank, blank, none, blank, torch.tensor(1.0))
        key, item = torch.zeros(len(self.lengths), T, 1), torch.zeros_like(self.targets)
        found = model.read(model.summarise(history), Target(table[self.targets], key, item, item)).vectors
        (found[:, :, 0] * self.weight).sum().backward()
        return found.detach(), table.grad

    def theirs(self, model, caught: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of theirs, whose long-term part leaves what it returns in `caught`."""
        table = model.embedding_layer.embedding_layer.embedding_layers["item"].weight
        with torch.no_grad():
            table.copy_(self.table)
        table.grad = None
        behaviors = self.behaviors[:, None].expand(-1, T, -1)
        item = torch.cat([behaviors, self.targets[..., None]], 2).flatten()
        caught.clear()
        model(({}, {"item": item}, self.mask[:, None].expand(-1, T, -1).flatten(0, 1).float()))
        (found,) = caught
        found = found.view(len(self.lengths), T, D)
        (found * self.weight).sum().backward()
        return found.detach(), table.grad


def reference(name: str, num_rows: int, **options):
    """One of their models on a single feature, the item, of which every behavior and target has a row of its own."""
    from fuxictr.features import FeatureMap

    features = FeatureMap("none", "none")
    features.features["item"] = {"type": "categorical", "source": "item", "vocab_size": num_rows}
    features.labels, features.default_emb_dim = ["label"], D
    made = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}.{name}"), name)
    common = {"optimizer": "adam", "loss": "binary_crossentropy", "verbose": 0, "model_root": "none", "metrics": []}
    if name != "DIN":
        common["short_seq_len"] = 2  # of their recent branch, which needs less than the whole history
    torch.manual_seed(0)
    model = made(features, embedding_dim=D, dnn_hidden_units=[4], **common, **options)
    with torch.no_grad():  # theirs start so small that nothing would be told apart
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def catch(part: torch.nn.Module) -> list[torch.Tensor]:
    caught: list[torch.Tensor] = []
    part.register_forward_hook(lambda _part, _inputs, output: caught.append(output))
    return caught


@torch.no_grad()
def copy_weights(pairs: dict[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in pairs.items():
        assert ours.shape == theirs.shape
        ours.copy_(theirs)


def attention_pairs(ours, theirs, key: str = "W_k") -> dict[torch.Tensor, torch.Tensor]:
    pairs = {"W_q": "W_q", "W_k": key, "W_v": "W_v", "W_o": "W_o"}
    return {getattr(ours, name).weight: getattr(theirs, other).weight for name, other in pairs.items()}


def assert_same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert theirs[0].abs().mean() > 0.05
    torch.testing.assert_close(ours[0][:, :, 0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


def sim_pair(case: Case, k: int):
    theirs = reference("SIM", len(case.table), attention_dim=D, num_heads=2, topk=k)
    ours = SimSoft(SIZES, k=k, num_heads=2, gap_dim=0, search_dim=D)
    copy_weights(attention_pairs(ours.exact.attention, theirs.long_attention))
    copy_weights({ours.W_a.weight: theirs.W_a.weight, ours.W_b.weight: theirs.W_b.weight})
    return ours, theirs


@pytest.mark.parametrize("k", [1, K, 40])
def test_sim_soft(k):
    case = Case(FULL)
    ours, theirs = sim_pair(case, k)
    pooled: list[torch.Tensor] = []
    theirs.dnn_aux.register_forward_pre_hook(lambda _part, inputs: pooled.append(inputs[0][:, D:]))
    found = case.ours(ours)
    assert_same(found, case.theirs(theirs, catch(theirs.long_attention)))
    torch.testing.assert_close(found[0][:, :, 1] * L, pooled[0].view(-1, T, D), atol=1e-4, rtol=1e-5)


def test_sim_soft_differs_where_theirs_lets_padding_in():
    case = Case(PADDED)
    ours, theirs = sim_pair(case, K)
    found, expected = case.ours(ours)[0][:, :, 0], case.theirs(theirs, catch(theirs.long_attention))[0]
    score = (case.table[case.targets] @ ours.W_a.weight.T) @ (case.table[case.behaviors] @ ours.W_b.weight.T).mT
    positive = ((score > 0) & case.mask[:, None]).sum(2)
    room = torch.tensor(case.lengths).clamp(max=K)[:, None]
    # Padding gets in as far as it is there: with 12 behaviors of 12 it cannot.
    lets_in = (positive < room) & (torch.tensor(case.lengths) < L)[:, None]
    assert lets_in.any()
    assert not lets_in.all()
    same = torch.isclose(found, expected, atol=1e-5, rtol=1e-5).all(2)
    assert torch.equal(same, ~lets_in)


def test_sim_soft_that_keeps_everything_is_the_same_with_padding():
    case = Case(PADDED)
    ours, theirs = sim_pair(case, L)
    assert_same(case.ours(ours), case.theirs(theirs, catch(theirs.long_attention)))


@pytest.mark.parametrize("lengths", [PADDED, FULL])
@pytest.mark.parametrize("k", [1, K, 40])
def test_eta(k, lengths):
    case, num_bits = Case(lengths), 2048
    theirs = reference("ETA", len(case.table), attention_dim=D, num_heads=2, topk=k, hash_bits=num_bits)
    ours = Eta(SIZES, k=k, num_bits=num_bits, num_heads=2)
    copy_weights(attention_pairs(ours.attention, theirs.long_attention))
    copy_weights({ours.planes: theirs.random_rotations[0]})
    bits = (case.table @ ours.planes > 0).float()
    distance = torch.cdist(bits[case.targets], bits[case.behaviors], p=1).masked_fill(~case.mask[:, None], num_bits)
    if k < L:
        last, next_one = distance.sort(dim=2).values[:, :, k - 1 : k + 1].unbind(2)
        assert (last < next_one)[torch.tensor(lengths) > k].all(), "a tie for the last place: take another seed"
    assert_same(case.ours(ours), case.theirs(theirs, catch(theirs.long_attention)))


@pytest.mark.parametrize("lengths", [PADDED, FULL])
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(("num_groups", "num_bits"), [(1, 1), (6, 2), (16, 3)])
def test_sdim(num_groups, num_bits, l2_norm, lengths):
    case = Case(lengths)
    options = {"num_hashes": num_groups, "hash_bits": num_bits, "l2_norm": l2_norm}
    theirs = reference("SDIM", len(case.table), attention_dim=D, **options)
    with torch.no_grad():  # no weight, but a parameter all the same
        theirs.powers_of_two.copy_(2.0 ** torch.arange(num_bits))
    ours = Sdim(SIZES, num_groups=num_groups, num_bits=num_bits, l2_norm=l2_norm)
    copy_weights({ours.planes: theirs.random_rotations[0].flatten(1)})
    caught, attention = [], theirs.lsh_attentioin
    theirs.lsh_attentioin = lambda *args: caught.append(attention(*args)) or caught[-1]
    assert_same(case.ours(ours), case.theirs(theirs, caught))


@pytest.mark.parametrize("lengths", [PADDED, FULL])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("k", [1, K, 40])
def test_twin(k, num_heads, lengths):
    case = Case(lengths)
    theirs = reference("TWIN", len(case.table), attention_dim=D, num_heads=num_heads, topk=k)
    ours = Twin(SIZES, k=k, num_heads=num_heads, cross=False, per_head=True)
    copy_weights(attention_pairs(ours.attention, theirs.long_attention, key="W_h"))
    assert_same(case.ours(ours), case.theirs(theirs, catch(theirs.long_attention)))


@pytest.mark.parametrize("lengths", [PADDED, FULL])
@pytest.mark.parametrize("softmax", [True, False])
def test_din(softmax, lengths):
    case = Case(lengths)
    options = {"attention_hidden_units": [9], "attention_hidden_activations": "ReLU", "din_use_softmax": softmax}
    theirs = reference("DIN", len(case.table), **options)
    ours = DinUnit(SIZES, hidden=9, activation="relu", softmax=softmax)
    first, _, last = theirs.attention_layers.attention_layer.mlp
    copy_weights({ours.first.weight: first.weight, ours.first.bias: first.bias})
    copy_weights({ours.last.weight: last.weight, ours.last.bias: last.bias})
    assert_same(case.ours(ours), case.theirs(theirs, catch(theirs.attention_layers)))
