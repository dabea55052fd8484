"""The trainers of sentence-transformers, trl and Transformers' Seq2Seq, each against the stock one and a loop by hand."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import SeedSteps
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import adasam_hf
from adasam_hf import (
    AdaSAMSeq2SeqTrainer,
    AdaSAMSeq2SeqTrainingArguments,
    SharpnessAwareArgumentsMixin,
    SharpnessAwareTrainerMixin,
    counters,
)

RHO, LR = 0.3, 1e-2
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
WORDS = "a the film book story warm funny dull long short is was very and i loved it hated every minute of this".split()


def row_of_words(i, count):
    return " ".join(WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(count))


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)


# ---- the loop written by hand ----


class ByHand:
    """SAM and plain SGD over windows of micro-batches.

    Args:
        groups: lists of parameters with their learning rates.
        share: of (window, i), micro-batch i's share of the window's loss.
        ascent: of (step, window, part), the loss whose gradient the ascent takes for the micro-batches in `part`; by
            default what the descent takes.
        fresh: whether the descent draws new random numbers, which it must not.
    """

    def __init__(self, groups, share, *, scope="batch", rho=RHO, ascent=None, fresh=False):
        self.groups, self.share, self.scope, self.rho, self.ascent, self.fresh = groups, share, scope, rho, ascent, fresh
        self.params = [p for params, _ in groups for p in params]

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.params, materialize_grads=True)

    def along(self, step, window, part, states):
        if self.ascent is not None:
            return self.gradient(self.ascent(step, window, part))
        total = None
        for i in part:
            states[i] = torch.get_rng_state()
            found = self.gradient(self.share(window, i))
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total

    def run(self, windows):
        for step, window in enumerate(windows):
            torch.manual_seed(100 + step)  # as SeedSteps does
            everything = range(len(window))
            descent = [torch.zeros_like(p) for p in self.params]
            for part in [everything] if self.scope == "batch" else [[i] for i in everything]:
                states = {}
                s = self.along(step, window, part, states)
                norm = torch.stack([g.square().sum() for g in s]).sum().sqrt()
                clean = [p.detach().clone() for p in self.params]
                self.write([w + self.rho * g / norm for w, g in zip(clean, s, strict=True)])
                for i in part:
                    if states and not self.fresh:
                        torch.set_rng_state(states[i])
                    found = self.gradient(self.share(window, i))
                    descent = [a + b for a, b in zip(descent, found, strict=True)]
                self.write(clean)
            rates = [rate for params, rate in self.groups for _ in params]
            self.write([p.detach() - r * g for p, r, g in zip(self.params, rates, descent, strict=True)])
        return weights(self.params)

    @torch.no_grad()
    def write(self, values):
        for p, value in zip(self.params, values, strict=True):
            p.copy_(value)


def weights(params):
    return torch.cat([p.detach().flatten().clone() for p in params])


class Recorder:
    """A collator that notes what it was given and what it made of that."""

    def __init__(self, collator):
        self.collator, self.rows, self.batches = collator, [], []

    def __call__(self, rows):
        self.rows.append(copy.deepcopy(rows))
        batch = self.collator(copy.deepcopy(rows))
        self.batches.append(copy.deepcopy(batch))
        return batch

    def __getattr__(self, name):
        return getattr(self.__dict__["collator"], name)

    def windows(self, steps, k):
        """As they were trained on. (The loader reads one micro-batch ahead.)"""
        return [copy.deepcopy(self.batches[i : i + k]) for i in range(0, steps * k, k)]


def flags(tmp_path, **more):
    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    common |= {"optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return common | {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3} | more


def finished(trainer):
    """What a training ends in: its weights, its log, and what it has seen."""
    trainer.add_callback(SeedSteps())
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()
    params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    windows = recorder.windows(trainer.state.global_step, trainer.args.gradient_accumulation_steps)
    return SimpleNamespace(trainer=trainer, weights=weights(params), logs=logs, seen=recorder, windows=windows)


def assert_stock_at_small_radii(run, keys=("loss",)):
    """`run(sharp, **flags)` at radius 0 is the stock run, bit for bit, and at a tiny one nearly; returns the stock run."""
    stock, zero, tiny = run(False), run(True, sam_rho=0.0), run(True, sam_rho=1e-10)
    assert torch.equal(zero.weights, stock.weights)
    assert not any(key.startswith("sam_") for entry in zero.logs for key in entry)
    assert (tiny.weights - stock.weights).abs().max() < 1e-8
    assert all(entry["sam_grad_norm"] > 0 for entry in tiny.logs)
    for key in keys:
        want = [entry[key] for entry in stock.logs]
        assert [entry[key] for entry in zero.logs] == want
        assert [entry[key] for entry in tiny.logs] == pytest.approx(want, abs=1e-7)
    return stock


def assert_follows(got, by_hand, *wrong):
    """`got` is what the loop by hand gives, and not what any of `wrong` does."""
    assert (got - by_hand).abs().max() < 1e-10
    for other in wrong:
        assert (got - other).abs().max() > 1e-6


# ---- sentence-transformers ----


@pytest.fixture
def sentences(tmp_path, tokenizer):
    """Makes the trainers of sentence-transformers, and what they are made of."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers, of the extra `test`, is missing")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    @dataclass(repr=False)
    class Arguments(SharpnessAwareArgumentsMixin, st.SentenceTransformerTrainingArguments):
        pass

    class Sharp(SharpnessAwareTrainerMixin, st.SentenceTransformerTrainer):
        pass

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    folder = str(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def model(dropout=True):
        made = Transformer(folder)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1 if dropout else 0.0
        return st.SentenceTransformer(modules=[made, Pooling(16)], device="cpu").double()

    def softmax(model):
        torch.manual_seed(1)
        return losses.SoftmaxLoss(model, 16, 3).double()

    def train(make_loss, sharp, dropout=True, labels=True, **more):
        count = 32
        columns = {"a": [row_of_words(i, 3 + i % 4) for i in range(count)]}
        columns["b"] = [row_of_words(i + 50, 2 + i % 5) for i in range(count)]
        if labels:
            columns["label"] = [i * i % 3 for i in range(count)]
        module = model(dropout)
        kind, arguments = (Sharp, Arguments) if sharp else (st.SentenceTransformerTrainer, None)
        args = (arguments or st.SentenceTransformerTrainingArguments)(**flags(tmp_path, **more))
        return kind(module, args, train_dataset=Dataset.from_dict(columns), loss=make_loss(module))

    return SimpleNamespace(train=train, model=model, softmax=softmax, losses=losses)


def features(batch):
    """Of each column of texts, as a loss takes them; and the labels."""
    columns = [key.removesuffix("input_ids") for key in batch if key.endswith("_input_ids")]
    found = [{k.removeprefix(c): v for k, v in batch.items() if k.startswith(c)} for c in columns]
    return found, batch.get("label")


def mean_loss(loss):
    """Of a window: the mean over its micro-batches."""
    return lambda window, i: loss(*features(copy.deepcopy(window[i]))) / len(window)


def in_groups(module, rates):
    """Parameters of a loss and of its model, by the ending of their learning rates' patterns."""
    named = list(module.named_parameters())
    groups = [([p for n, p in named if pattern in n], rate) for pattern, rate in rates.items()]
    taken = {id(p) for params, _ in groups for p in params}
    return [([p for _, p in named if id(p) not in taken], LR), *groups]


def by_hand_for_loss(run, module, scope, *, rates=None, still=False, **more):
    """`still`: without the loss's own weights, which then stay as they are."""
    groups = in_groups(module, rates or {})
    if still:
        groups = [([p for p in params if all(p is not q for q in module.classifier.parameters())], r) for params, r in groups]
    module.train()
    ByHand(groups, mean_loss(module), scope=scope, **more).run(run.windows)
    return weights(module.parameters())


def of_loss(run):
    return weights(run.trainer.loss.parameters())


@SCOPES
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.compat("Trainer behaviour", "sentence-transformers: a loss with weights (`SoftmaxLoss`)")
def test_softmax_loss(sentences, scope, k):
    def run(sharp, **more):
        more = {"sam_scope": scope, **more} if sharp else more
        mapping = {"classifier": 5e-2}
        return finished(
            sentences.train(
                sentences.softmax, sharp, gradient_accumulation_steps=k, learning_rate_mapping=mapping, **more
            )
        )

    def by_hand(real, rates, of=scope, **more):
        return by_hand_for_loss(real, sentences.softmax(sentences.model()), of, rates=rates, **more)

    stock = assert_stock_at_small_radii(run)
    real = run(True, sam_rho=RHO)
    rates = {"classifier": 5e-2}
    other = {"batch": "microbatch", "microbatch": "batch"}[scope]
    wrong = [by_hand(real, {}), by_hand(real, rates, fresh=True), of_loss(stock)]
    wrong += [by_hand(real, rates, still=True), *([by_hand(real, rates, of=other)] if k > 1 else [])]
    assert_follows(of_loss(real), by_hand(real, rates), *wrong)


@pytest.mark.parametrize("optim", ["adasam", "amsgrad", "sam", "sgdm", "adamw_torch"])
@pytest.mark.compat("Trainer behaviour", "sentence-transformers: `learning_rate_mapping`")
def test_learning_rates_by_layer(sentences, optim):
    """The groups are those of the stock trainer, for every optimizer."""

    def groups(sharp, **more):
        trainer = sentences.train(sentences.softmax, sharp, learning_rate_mapping={"classifier": 5e-2}, **more)
        trainer.create_optimizer()
        names = {id(p): n for n, p in trainer.loss.named_parameters()}
        found = [
            (sorted(names[id(p)] for p in g["params"]), g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups
        ]
        return type(trainer.optimizer).__name__, found

    stock = groups(False, optim="adamw_torch", weight_decay=0.1)
    name, found = groups(True, optim=optim, weight_decay=0.1)
    assert found == stock[1] and any("classifier.weight" in names and rate == 5e-2 for names, rate, _ in found)
    assert name == {"adasam": "AdaSAM", "amsgrad": "AdaSAM", "adamw_torch": "AdamW"}.get(optim, "SGD")
    trainer = sentences.train(sentences.softmax, True, optim=optim, learning_rate_mapping={"classifier": 5e-2})
    before = trainer.loss.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.loss.classifier.weight)
    unmapped = sentences.train(sentences.softmax, True, optim=optim)
    unmapped.create_optimizer()
    assert {group["lr"] for group in unmapped.optimizer.param_groups} == {LR}  # the control


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.compat("Trainer behaviour", "sentence-transformers: in-batch negatives with `sam_preset=fast`")
def test_in_batch_negatives(sentences, scope, k):
    """Of 8 rows an eighth is one, whose loss is 0; two are chosen, and the ascent is along their gradient."""

    def run(sharp, **more):
        more = {"sam_preset": "fast", "sam_scope": scope, **more} if sharp else more
        size = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": k, "max_steps": 2}
        make = sentences.losses.MultipleNegativesRankingLoss
        return finished(sentences.train(make, sharp, dropout=False, labels=False, **size, **more))

    stock = assert_stock_at_small_radii(run, keys=())  # the loss that is logged is that of two rows
    real = run(True, sam_rho=RHO)
    assert {entry["sam_ascent_share"] for entry in real.logs} == {2 / (8 * k) if scope == "batch" else 2 / 8}
    collate = real.seen.collator

    def by_hand(positions):
        module = sentences.losses.MultipleNegativesRankingLoss(sentences.model(dropout=False))

        def ascent(step, window, part):
            rows = real.seen.rows[step * k + max(part)]  # of several micro-batches the last is the one that takes part
            return module(*features(collate([copy.deepcopy(rows[i]) for i in positions])))

        return by_hand_for_loss(real, module, scope, ascent=ascent)

    assert_follows(of_loss(real), by_hand([0, 4]), by_hand([0, 1]), by_hand(range(8)), of_loss(stock))
    one = sentences.losses.MultipleNegativesRankingLoss(sentences.model(dropout=False))
    alone = collate([copy.deepcopy(real.seen.rows[0][0])])
    assert one(*features(alone)).item() == 0  # why it has to be two


class InParts(nn.Module):
    """A loss of two parts, which the library logs one by one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels):
        a, b = (self.model(column)["sentence_embedding"] for column in sentence_features)
        return {"near": (a - b).square().mean(), "small": 0.1 * (a.square().mean() - labels.double().mean()).square()}


@SCOPES
@pytest.mark.compat("Trainer behaviour", "sentence-transformers: parts of a loss are logged once")
def test_parts_of_a_loss(sentences, scope, monkeypatch):
    def run(sharp, **more):
        more = {"sam_scope": scope, **more} if sharp else more
        return finished(sentences.train(InParts, sharp, dropout=False, gradient_accumulation_steps=2, **more))

    assert_stock_at_small_radii(run, keys=("loss", "near", "small"))
    real = run(True, sam_rho=1.0)
    module = InParts(sentences.model(dropout=False)).train()
    first = [module(*features(copy.deepcopy(batch))) for batch in real.windows[0]]
    for part in ("near", "small"):
        assert real.logs[0][part] == pytest.approx(sum(x[part].item() for x in first) / 2, abs=6e-5)  # 4 digits
    assert real.logs[0]["near"] + real.logs[0]["small"] == pytest.approx(real.logs[0]["loss"], abs=2e-4)
    monkeypatch.setattr(counters, "COUNTERS", ())  # the control
    twice = run(True, sam_rho=1.0)
    assert abs(twice.logs[0]["near"] - real.logs[0]["near"]) > 1e-3
