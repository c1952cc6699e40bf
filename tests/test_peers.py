"""The peers of benchmarks/studies/peers: what their papers say of small cases."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from benchmarks.studies.choice import accuracy
from benchmarks.studies.field import OWN, _nearest, cases_of, wanted
from benchmarks.studies.peers import PEERS, blocks, flap, llm_pruner, modegpt, two_ssp
from benchmarks.studies.peers.layers import Layer, layers_of, to_remove, watched
from benchmarks.tables.field import field
from dotresize.accounting import count_parameters
from dotresize.evaluate import perplexity
from dotresize.least_squares import gram
from dotresize.models.causal_lm import CausalLM


def small_model(layers: int = 8, **changes) -> CausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.2, **changes,
    )  # fmt: skip
    return CausalLM.in_memory(transformers.LlamaForCausalLM(config).eval())


TOKENS = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1))


def logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=TOKENS).logits


def zeros(model: CausalLM) -> int:
    """Return the parameters of neurons, and of heads with all that share them, that write zero."""
    count = 0
    for layer in layers_of(model):
        heads = (~layer.o.weight.any(0)).view(layer.groups, -1).all(1)
        count += int(heads.sum()) * layer.of_group
        count += int((~layer.down.weight.any(0)).sum()) * layer.of_neuron
    return count


def added_biases(model: CausalLM) -> int:
    biases = [one.bias for layer in layers_of(model) for one in (layer.o, layer.down)]
    return sum(len(bias) for bias in biases if bias is not None)


@pytest.mark.parametrize("name", PEERS)
def test_each_leaves_the_share_and_the_model(name):
    model = small_model(layers=12)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    whole = count_parameters(model)["non_embedding"]
    for share in (0.9, 0.75):
        made = PEERS[name].prune(model, TOKENS, share)
        # A layer is a twelfth of the model; a head with those that share it less than a hundredth.
        units = 1 / 24 if name in ("SLEB", "ShortGPT") else 0.012
        assert abs((whole - made.removed) / whole - share) <= units
        assert torch.isfinite(logits(made.model)).all()
        if name in ("FLAP", "LLM-Pruner", "2SSP"):
            assert made.removed == zeros(made.model) - added_biases(made.model)
        assert perplexity(made.model, TOKENS) != perplexity(model, TOKENS)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


def test_flap_makes_constant_neurons_a_bias():
    """Inputs that never change go first, and the bias writes what they wrote."""
    model = small_model(layers=1, mlp_bias=True)
    layer = Layer(model, 0)
    with torch.no_grad():
        for reader in (layer.gate, layer.up):  # SiLU(2) * 2, whatever is read
            reader.weight[:8] = 0
            reader.bias[:8] = 2.0
    expected = logits(model)
    constant = 8 * layer.of_neuron / count_parameters(model)["non_embedding"]
    made = flap.prune(model, TOKENS, 1 - constant)
    assert not Layer(made.model, 0).down.weight[:, :8].any()
    torch.testing.assert_close(logits(made.model), expected)
    moments = flap._Moments()
    x = torch.randn(3, 5, 4)
    moments.add(x[:2])
    moments.add(x[2:])
    torch.testing.assert_close(moments.mean, x.flatten(0, 1).double().mean(0))
    torch.testing.assert_close(moments.variance, x.flatten(0, 1).double().var(0))
    writer = nn.Linear(4, 3, bias=False)
    mean, gone = torch.randn(4).double(), torch.tensor([True, False, True, False])
    assert flap._compensate(writer, mean, gone) == 3
    torch.testing.assert_close(
        writer.bias.double(), writer.weight.double()[:, gone] @ mean[gone], rtol=1e-6, atol=1e-6
    )


def test_llm_pruner_counts_as_published():
    """25 % of the layers 4 to 30 of a 7 B Llama leave 5.42 B parameters (Table 1 of the paper)."""
    config = transformers.LlamaConfig()
    with torch.device("meta"):
        model = CausalLM.in_memory(transformers.LlamaForCausalLM(config))
    layer, inside = Layer(model, 0), 26
    wanted_gone = int(0.25 * inside * (layer.of_attention + layer.of_feed_forward))
    groups, neurons = llm_pruner.counts(layer, inside, wanted_gone)
    assert (groups, neurons) == (8, 2752)
    gone = inside * (groups * layer.of_group + neurons * layer.of_neuron)
    left = count_parameters(model)["total"] - gone
    assert round(left / 1e9, 2) == 5.42


def test_llm_pruner_sums_weight_times_gradient():
    model = small_model(layers=7).copied()
    llm_pruner.take_gradients(model, TOKENS)
    layer = Layer(model, 3)
    rows = [linear.weight[5] * linear.weight.grad[5] for linear in (layer.gate, layer.up)]
    column = layer.down.weight[:, 5] * layer.down.weight.grad[:, 5]
    expected = sum(one.abs().sum() for one in [*rows, column])
    torch.testing.assert_close(llm_pruner.importance_of_neurons(layer)[5], expected)
    assert model.module.model.embed_tokens.weight.grad is None
    size, shared = layer.size, layer.heads // layer.groups
    salience = llm_pruner._salience
    expected = (
        salience(layer.q)[shared * size : 2 * shared * size].sum()
        + salience(layer.k)[size : 2 * size].sum()
        + salience(layer.v)[size : 2 * size].sum()
        + salience(layer.o)[:, shared * size : 2 * shared * size].sum()
    )
    torch.testing.assert_close(llm_pruner.importance_of_groups(layer)[1], expected)


def test_modegpt_keeps_what_has_leverage_and_writes_by_least_squares():
    """Nystrom: silent neurons have none, and the others write for those that go."""
    model = small_model(layers=1)
    layer = Layer(model, 0)
    with torch.no_grad():
        layer.gate.weight[::2] = 0
    expected, seen = logits(model), []
    for _, (inner, _) in watched(model, TOKENS, lambda one: [one.down]):
        seen.append(inner.flatten(0, 1))
    h = torch.cat(seen).double()
    written = h @ layer.down.weight.double().mT
    assert modegpt.nystrom(layer, gram(h).double(), 20) == 20 * layer.of_neuron
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert modegpt.nystrom(layer, gram(h).double(), 12) == 28 * layer.of_neuron
    kept = layer.down.weight.any(0)
    best = torch.linalg.lstsq(h[:, kept], written).solution
    torch.testing.assert_close(layer.down.weight.double()[:, kept].mT, best, rtol=1e-3, atol=1e-3)


def test_modegpt_cuts_ranks_and_rows_that_are_not_there():
    """SVD and CR: values of low rank, and rows of keys that are zero, cost nothing."""
    model = small_model(layers=1)
    layer = Layer(model, 0)
    with torch.no_grad():
        heads = layer.v.weight.view(layer.groups, layer.size, -1)
        heads[:, 2:] = heads[:, :2] * 0.5
        keys = layer.k.weight.view(layer.groups, layer.size, -1)
        keys[:, 1] = keys[:, 1 + layer.size // 2] = 0  # two that a rotation mixes
    expected = logits(model)
    of_read = torch.zeros(24, 24, dtype=torch.float64)
    for _, (x, _) in watched(model, TOKENS, lambda one: [one.q]):
        of_read += gram(x.flatten(0, 1))
    of_read = modegpt._regular(of_read)
    assert modegpt.cut_values(layer, of_read, 2) == (layer.size - 2) * 24 * 9
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert modegpt.cut_queries(layer, of_read, layer.size - 2) == 2 * 24 * 9
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    rows = layer.q.weight.view(layer.heads, layer.size, -1)
    assert not rows[:, 1].any()
    assert not rows[:, 1 + layer.size // 2].any()
    assert rows[:, 0].any()


def test_modegpt_cuts_more_where_layers_do_less():
    influence = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
    found = modegpt.allocation(influence, 0.2)
    assert found.mean() == pytest.approx(0.2)
    assert found[1] == found[2] > found[3] > found[0]
    torch.testing.assert_close(found, 0.8 * (-influence / 0.1).softmax(0))
    cut_off = modegpt.allocation(influence, 0.45)
    assert cut_off.max() == modegpt.MOST
    assert cut_off.mean() == pytest.approx(0.45)


def test_2ssp_removes_attentions_by_its_rule():
    """A feed-forward of Llama-2-7B has 2.016 times the weights of attention; it has 32 layers."""
    with torch.device("meta"):
        model = CausalLM.in_memory(transformers.LlamaForCausalLM(transformers.LlamaConfig()))
    layer = Layer(model, 0)
    found = [two_ssp.attentions_to_remove(layer, 32, share) for share in (0.25, 0.375, 0.5)]
    assert found == [5, 9, 13]
    assert two_ssp.attentions_to_remove(layer, 32, 1.0) == 32


def test_2ssp_takes_quiet_neurons_and_the_attention_least_missed():
    model = small_model(layers=4)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.gate.weight[:3] = 0
    made = two_ssp.prune(model, TOKENS, 0.5)
    for layer in layers_of(made.model):
        assert not layer.down.weight[:, :3].any()
    gone = [not layer.o.weight.any() for layer in layers_of(made.model)]
    assert sorted(made.about["attentions"]) == [i for i in range(4) if gone[i]]
    assert sum(gone) == 2
    found = []
    for number in range(4):
        other = model.copied()
        with torch.no_grad():
            Layer(other, number).o.weight.zero_()
        found.append(perplexity(other, TOKENS))
    assert two_ssp._remove_attention(model, layers_of(model), TOKENS) == found.index(min(found))


@pytest.mark.parametrize("prune", [blocks.short_gpt, blocks.sleb])
def test_layers_that_do_nothing_go_first(prune):
    model = small_model()
    with torch.no_grad():
        for number in (2, 5):
            layer = Layer(model, number)
            layer.o.weight.zero_()
            layer.down.weight.zero_()
    made = prune(model, TOKENS, 0.75)
    assert made.about == {"layers": [2, 5]}
    assert len(made.model.layers) == 6
    torch.testing.assert_close(logits(made.model), logits(model))


def test_short_gpt_counts_as_published():
    """9 of 32 layers are 27 % of a 7 B Llama (Table 1 of the paper)."""
    with torch.device("meta"):
        model = CausalLM.in_memory(transformers.LlamaForCausalLM(transformers.LlamaConfig()))
    counts = count_parameters(model)
    one = sum(weight.numel() for weight in Layer(model, 0).module.parameters())
    assert round(9 * one / counts["total"], 2) == 0.27
    assert blocks.layers_to_remove(model, 1 - 9 * one / counts["non_embedding"]) == 9


def test_sleb_goes_on_from_a_longer_search():
    model = small_model()
    more = blocks.sleb(model, TOKENS, 0.75)
    fewer = blocks.sleb(model, TOKENS, 0.875)
    assert set(fewer.about["layers"]) < set(more.about["layers"])
    assert 0 < fewer.seconds < more.seconds
    # The layer that goes first is the one without which whole models have the lowest perplexity.
    found = [
        perplexity(blocks._without(model, [i], None).model, blocks._Search(model, TOKENS)._tokens)
        for i in range(8)
    ]
    assert fewer.about["layers"] == [min(range(8), key=lambda i: found[i])]


def test_multiple_choice_by_likelihood():
    model = small_model().module
    items = []
    for i in range(5):
        choices = [torch.randint(0, 64, (3 + k,)) for k in range(4)]
        items.append((TOKENS[i, :7], choices, i % 4))
    right = 0
    for context, choices, answer in items:  # each choice behind its context, whole
        sums = []
        for choice in choices:
            ids = torch.cat([context, choice])[None]
            with torch.no_grad():
                found = model(input_ids=ids).logits[0, 6:-1].log_softmax(-1)
            sums.append(float(found.gather(1, choice[:, None]).sum()))
        right += sums.index(max(sums)) == answer
    assert accuracy(model, items) == right / 5


def test_cases_of_the_field():
    cases = cases_of(small_model())
    assert cases == [*OWN, *PEERS]
    runs = list(wanted([0, 1], [0.9, 0.8], cases))
    assert len(runs) == len(set(runs)) == 1 + 4 * len(cases)
    assert [share for case, share, _ in runs if case == "SLEB"] == [0.8, 0.9, 0.8, 0.9]
    assert _nearest(lambda n: 3 * n, 10, 17) == 6
    assert to_remove(small_model(), 1.0) == 0


def test_tables_of_the_field():
    """The best mean over the seeds first; the dense model last; a cell for each column."""

    def row(case, excess, **others):
        texts = dict.fromkeys(("wikipedia", "news", "documentation"), excess)
        return {
            **{"model": "M.Q4.gguf", "case": case, "share": 0.8, "seed": 0, "windows": 24},
            **{"excess": texts, "kl": texts, "agreement": texts, "accuracy": 0.5, "items": 86},
            "generated": {"repeated": 0.25, "perplexity": 3.0, "continuations": 20},
            **{"parameters": 80_000_000, "seconds": 61.4, "added_bytes": 2**30, "plain": True},
            **{"device": "a CPU", "date": "2026-11-30"},
            **others,
        }

    rows = [
        row("dense", 0.0, share=1.0),
        row("FLAP", 0.7, plain=False, paper="arXiv 2312.11983"),
        row("dotresize, equal widths", 0.4),
        row("dotresize, equal widths", 0.5, seed=1),
        row("ShortGPT", 0.3, share=0.9),
    ]
    lines = [line for line in field(rows).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert names[2:5] == ["dotresize, equal widths", "FLAP", "dense"]
    assert "| plain | 80.0 M | 0.450 | 0.400, 0.500 | 0.450 |" in lines[2]
    assert "| simulated |" in lines[3]
    assert names[7] == "ShortGPT"
    assert field([]) == "No rows yet."
