"""What every head computes, and how it starts: forward, backward, losses, initialisation, memory."""

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    pipeline,
)

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
    configure_kernels,
    prune_regrow_,
    sparse_layers,
    use_backend,
)
from hf_dynsparse.models.position_bias import set_position_bias_
from tests.toy import toy_batch, toy_config, toy_model, toy_tokenizer


FOUR = torch.tensor([0, 1, 1, 0])
# The class, its Auto class, and what its loss needs besides a batch of four rows.
HEADS = [
    (DynSparseBertModel, AutoModel, {}),
    (DynSparseBertForMaskedLM, AutoModelForMaskedLM, {"labels": toy_batch()["labels"]}),
    (
        DynSparseBertForPreTraining,
        AutoModelForPreTraining,
        {"labels": toy_batch()["labels"], "next_sentence_label": FOUR},
    ),
    (DynSparseBertForSequenceClassification, AutoModelForSequenceClassification, {"labels": FOUR}),
    (DynSparseBertForTokenClassification, AutoModelForTokenClassification, {"labels": FOUR[:, None].repeat(1, 12)}),
    (
        DynSparseBertForQuestionAnswering,
        AutoModelForQuestionAnswering,
        {"start_positions": FOUR, "end_positions": FOUR + 3},
    ),
    (DynSparseBertForMultipleChoice, AutoModelForMultipleChoice, {"labels": torch.tensor([3])}),
]
each_head = pytest.mark.parametrize(("cls", "auto", "targets"), HEADS, ids=[cls.__name__ for cls, _, _ in HEADS])


def inputs_of(cls, **targets):
    batch = {**toy_batch(), **targets} if targets else toy_batch()
    if "labels" not in targets:
        batch.pop("labels")
    if cls is DynSparseBertForMultipleChoice:
        batch = {name: x[None] if x.dim() == 2 else x for name, x in batch.items()}
    return batch


@each_head
def test_forward_and_backward(cls, auto, targets):
    model = toy_model(cls=cls).train()
    output = model(**inputs_of(cls, **targets))
    loss = output.loss if targets else output.last_hidden_state.square().mean() + output.pooler_output.mean()
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in sparse_layers(model).values():
        assert layer.values.grad.shape == layer.values.shape
        assert layer.values.grad.any()


@each_head
def test_auto_classes_are_registered(cls, auto, targets):
    assert type(auto.from_config(toy_config())) is cls


def loaded_from_nothing(cls):
    # The path of `from_pretrained`, where everything is missing: tensors come uninitialised to `_init_weights`.
    return cls.from_pretrained(None, config=toy_config(), state_dict={})


@pytest.mark.parametrize("build", [lambda cls: cls(toy_config()), loaded_from_nothing], ids=["config", "loaded"])
@each_head
def test_fresh_weights(cls, auto, targets, build):
    layers = sparse_layers(build(cls))
    assert len(layers) == 12
    for name, layer in layers.items():
        layer.layout.validate(name)
        assert not layer.bias.any()
    values = torch.cat([layer.values.detach().flatten() for layer in layers.values()])
    # A normal distribution cut at two standard deviations keeps 0.8796 of its own.
    assert float(values.std()) == pytest.approx(0.02 * 0.8796, rel=0.05)
    assert 0.038 < float(values.abs().max()) <= 0.04
    assert abs(float(values.mean())) < 1e-3
    squares = [layer.block_index for layer in layers.values() if layer.shape == (32, 32)]
    assert len({tuple(index.tolist()) for index in squares}) == len(squares) == 8


def test_initial_topology_is_uniform():
    # 25 models of 8 square layers: each of the 64 positions is active in a quarter of 200 draws.
    counts = torch.zeros(64)
    for seed in range(25):
        for layer in sparse_layers(toy_model(seed, DynSparseBertModel)).values():
            if layer.shape == (32, 32):
                counts += layer.layout.to_mask().flatten()
    assert counts.sum() == 200 * 16
    assert (counts / 200 - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 200) ** 0.5


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, those on meta left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("sparsity", [0.9, 0])
def test_no_dense_encoder_matrix_is_allocated(sparsity):
    config = toy_config(hidden_size=64, vocab_size=32, block_size=8, sparsity=sparsity)
    with LargestTensor() as largest:
        DynSparseBertModel(config, add_pooling_layer=False)
    # The watch is good for something: with sparsity 0 it sees them.
    assert (largest.elements >= 64 * 64) == (sparsity == 0)


@pytest.mark.slow
def test_building_a_large_model_needs_no_memory_for_a_dense_encoder():
    script = """if True:
        import resource
        import torch
        from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        model = DynSparseBertForMaskedLM(DynSparseBertConfig.preset("large", sparsity=0.9, block_size=16))
        print(peak() - before, sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}))
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    growth, size = map(int, run.stdout.split())
    print(f"growth {growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")  # noqa: T201  (shown by pytest -s)
    dense_encoder = 24 * 12 * 1024**2 * 4
    assert dense_encoder == 1_207_959_552
    # The model is 121 MB of active blocks and 133 MB of embeddings and heads. Twice that is far from what is refuted.
    assert size < 0.25 * dense_encoder
    assert growth < 0.5 * dense_encoder


def test_sparsity_zero_is_stock_bert():
    ours = toy_model(sparsity=0)
    stock = BertForMaskedLM(toy_config(sparsity=0))
    stock.load_state_dict(ours.state_dict(), strict=True)
    batch = toy_batch()
    expected, got = stock.eval()(**batch), ours.eval()(**batch)
    assert torch.equal(expected.logits, got.logits)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    expected, got = stock.train()(**batch), ours.train()(**batch)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", [DynSparseBertForMaskedLM, DynSparseBertForPreTraining])
def test_logits_of_masked_positions_only_while_training(cls):
    model, batch = toy_model(cls=cls), toy_batch(masked=3)
    if cls is DynSparseBertForPreTraining:
        batch["next_sentence_label"] = FOUR
    full, sparse = model.eval()(**batch), model.train()(**batch)
    name = "logits" if cls is DynSparseBertForMaskedLM else "prediction_logits"
    assert full[name].shape == (4, 12, 64)
    assert sparse[name].shape == (4 * 3, 64)
    torch.testing.assert_close(sparse[name], full[name][batch["labels"] != -100])
    torch.testing.assert_close(sparse.loss, full.loss)
    sparse.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.config.sparse_prediction = False
    whole = model(**batch)
    assert whole[name].shape == (4, 12, 64)
    torch.testing.assert_close(whole.loss, sparse.loss)
    whole.loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-7, msg=key)
    # Without labels there is nothing to leave out.
    model.config.sparse_prediction = True
    assert model(batch["input_ids"])[name].shape == (4, 12, 64)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_num_items_in_batch(mode):
    model, batch = toy_model().train(mode), toy_batch(masked=3)
    mean = model(**batch).loss
    for items in (12, torch.tensor(12)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, mean)
    torch.testing.assert_close(model(**batch, num_items_in_batch=48).loss, mean / 4)
    # Micro-batches of unequal weight add up to the whole: 4 x 3 masked positions as 3 and 9.
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(model(**part, num_items_in_batch=12).loss for part in parts), mean)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch, num_items_in_batch=12).loss == 0


@pytest.mark.parametrize("cls", [DynSparseBertForMaskedLM, DynSparseBertForPreTraining])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_tuples(cls, mode):
    model, batch = toy_model(cls=cls).train(mode), toy_batch()
    if cls is DynSparseBertForPreTraining:
        batch["next_sentence_label"] = FOUR
    expected = model(**batch, output_hidden_states=True)
    got = model(**batch, output_hidden_states=True, return_dict=False)
    assert isinstance(got, tuple)
    assert len(got) == len(expected.to_tuple())
    assert len(got[-1]) == 3  # embeddings and two layers
    for one, other in zip(got[:-1], expected.to_tuple()[:-1], strict=True):
        assert torch.equal(one, other)


def test_only_the_masked_head_takes_the_number_of_items():
    # Else the Trainer would count on a division that inherited losses do not make (accumulation multiplies them).
    assert [cls.__name__ for cls, _, _ in HEADS if cls.accepts_loss_kwargs] == ["DynSparseBertForMaskedLM"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    model = toy_model().eval()
    other, batch = duplicate(model), toy_batch()
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    # A copy has a topology of its own.
    before = [layer.block_index.clone() for layer in sparse_layers(model).values()]
    for layer in sparse_layers(other).values():
        prune_regrow_(layer, pruning_ratio=0.5)
    for layer, other_layer, index in zip(
        sparse_layers(model).values(), sparse_layers(other).values(), before, strict=True
    ):
        assert torch.equal(layer.block_index, index)
        assert not torch.equal(other_layer.block_index, index)


def test_fill_mask_pipeline():
    model, tokenizer = toy_model().eval(), toy_tokenizer()
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    answers = fill("w3 [MASK] w5", top_k=3)
    logits = model(**tokenizer("w3 [MASK] w5", return_tensors="pt")).logits[0, 2]
    assert [answer["token"] for answer in answers] == logits.topk(3).indices.tolist()


def test_autocast():
    model, batch = toy_model().train(), toy_batch()
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert sparse_layers(model)["bert.encoder.layer.0.output.dense"].values.grad.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=5e-3, atol=0, check_dtype=False)
    assert not torch.equal(output.loss, expected)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = toy_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model(**toy_batch()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_old_name_of_activation_checkpointing():
    with pytest.warns(FutureWarning, match="deprecated"):
        toy_model().gradient_checkpointing_enable()


def test_compile_makes_one_graph():
    torch._dynamo.reset()
    model = toy_model(cls=DynSparseBertForPreTraining, num_hidden_layers=1, position_bias="alibi").train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for masked in (3, 5, 1, 8):
        set_position_bias_(model, 1 / masked)
        batch = {**toy_batch(masked=masked, seed=masked), "next_sentence_label": FOUR}
        expected = model(**batch).loss
        loss = compiled(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for layer in sparse_layers(model).values():
            prune_regrow_(layer, pruning_ratio=0.5, generator=torch.Generator().manual_seed(masked))
        model.zero_grad()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_model_on_meta_computes_shapes():
    with torch.device("meta"):
        model = DynSparseBertForSequenceClassification(toy_config(num_labels=3))
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    output = model(input_ids=ids, labels=ids[:, 0])
    output.loss.backward()
    assert output.logits.is_meta
    assert output.logits.shape == (2, 3)
    assert all(parameter.grad.is_meta for parameter in model.bert.encoder.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # a trace reads all
def test_a_trace_computes_what_the_model_does():
    model = toy_model(cls=DynSparseBertForSequenceClassification, return_dict=False).eval()
    ids = toy_batch()["input_ids"]
    traced = torch.jit.trace(model, (ids,))
    assert "hf_dynsparse::linear" in str(traced.inlined_graph)
    assert torch.equal(traced(ids.flip(1))[0], model(ids.flip(1))[0])


def test_gradients_of_samples_agree_with_those_of_the_dense_model():
    model = toy_model(cls=DynSparseBertForSequenceClassification).eval()
    ids = toy_batch()["input_ids"][:, None]

    def gradients(model):
        model.set_attn_implementation("eager")  # `vmap` warns of the other

        def loss(parameters, ids):
            return torch.func.functional_call(model, parameters, (ids,)).logits.square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), ids)

    ours, dense = gradients(model), gradients(model.to_dense().eval())
    for name, gradient in ours.items():
        if not name.endswith(".values"):
            torch.testing.assert_close(gradient, dense[name], rtol=1e-4, atol=1e-5)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that any operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(tensor.shape) for tensor in tree_leaves(result) if torch.is_tensor(tensor)}
        return result


@pytest.mark.parametrize("backend", ["native", "tiled", "workspace"])
def test_without_the_workspace_no_dense_weight_or_gradient_appears(backend):
    configure_kernels(dense_workspace=False)
    # Numbers that nothing else has the shape of: layers of 40 x 40, 56 x 40 and 40 x 56.
    model = toy_model(hidden_size=40, intermediate_size=56, num_hidden_layers=1).train()
    dense = {layer.shape for layer in sparse_layers(model).values()}
    dense |= {shape[::-1] for shape in dense}
    with use_backend(backend) if backend != "native" else nullcontext(), Shapes() as shapes:
        model(**toy_batch()).loss.backward()
    outside = {(40, 40)}  # the dense transformation in the head is as large
    assert bool((dense - outside) & shapes.seen) == (backend == "workspace")
