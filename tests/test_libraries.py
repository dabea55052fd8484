"""Trainers of sentence-transformers, trl and for Seq2Seq, each against the stock one and a loop written by hand."""

import copy
import subprocess
import sys
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

from adasam_hf import (
    AdaSAMSeq2SeqTrainer,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainer,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
    SharpnessAwareTrainerMixin,
    counters,
)

RHO, LR = 0.3, 1e-2
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
TEXT = "a the film book story warm funny dull long short is was very and i loved it hated every minute of this"
WORDS = TEXT.split()


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
        self.groups, self.share, self.scope, self.rho = groups, share, scope, rho
        self.ascent, self.fresh = ascent, fresh
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
    """`run(sharp, **flags)` is the stock run, which is returned: to the bit at radius 0, nearly so at a tiny one."""
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
        own = {id(p) for p in module.classifier.parameters()}
        groups = [([p for p in params if id(p) not in own], rate) for params, rate in groups]
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
            (sorted(names[id(p)] for p in g["params"]), g["lr"], g["weight_decay"])
            for g in trainer.optimizer.param_groups
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


@SCOPES
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.compat("Trainer behaviour", "sentence-transformers: in-batch negatives with `sam_preset=fast`")
def test_in_batch_negatives(sentences, scope, k):
    """Of 8 rows an eighth is one, whose loss is 0; two are chosen, and the ascent is along their gradient."""

    def run(sharp, **more):
        more = {"sam_preset": "fast", "sam_scope": scope, **more} if sharp else more
        size = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": k, "max_steps": 2}
        make = sentences.losses.MultipleNegativesRankingLoss
        return finished(sentences.train(make, sharp, dropout=False, labels=False, **size, **more))

    stock = assert_stock_at_small_radii(run, keys=())  # `loss` is that of two rows, and `sam_loss` that of all
    tiny = run(True, sam_rho=1e-10)
    assert [entry["sam_loss"] for entry in tiny.logs] == pytest.approx(
        [entry["loss"] for entry in stock.logs], abs=1e-7
    )
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


# ---- trl ----


def llama(tokenizer, dropout):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, "attention_dropout": dropout}
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, **special)).double()


@pytest.fixture
def preferences(tmp_path, tokenizer):
    """Makes trl's trainers: stock ones, with the mixins in front, and as they are when trl is imported under `patch()`.

    (Then what the mixins have stands between trl's class and the Trainer of Transformers.)
    """
    trl = pytest.importorskip("trl", reason="trl, of the extra `test`, is not installed")
    from datasets import Dataset

    def classes(name, how):
        kind, arguments = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
        if how == "mixin":
            kind = type("Sharp", (SharpnessAwareTrainerMixin, kind), {})
            arguments = dataclass(repr=False)(type("Arguments", (SharpnessAwareArgumentsMixin, arguments), {}))
        elif how == "patch":
            kind = type("Sharp", (kind, AdaSAMTrainer), {})
            arguments = dataclass(repr=False)(type("Arguments", (arguments, AdaSAMTrainingArguments), {}))
        return kind, arguments

    texts = [row_of_words(i, 3 + i % 6) for i in range(32)]
    rows = {"SFT": {"text": texts}}
    rows["DPO"] = {"prompt": texts, "chosen": [row_of_words(i + 9, 2 + i % 4) for i in range(32)]}
    rows["DPO"]["rejected"] = [row_of_words(i + 31, 3 + i % 3) for i in range(32)]

    def make(name, how=None, dropout=0.1, **more):
        kind, arguments = classes(name, how)
        extra = {}
        if name == "DPO":
            extra["ref_model"] = llama(tokenizer, 0.0)
            with torch.no_grad():
                for p in extra["ref_model"].parameters():
                    p.mul_(1.1)
        args = arguments(**flags(tmp_path, **{"bf16": False, "gradient_checkpointing": False, **more}))
        data = Dataset.from_dict(rows[name])
        return kind(model=llama(tokenizer, dropout), args=args, train_dataset=data, processing_class=tokenizer, **extra)

    return make


def labels_in(batch):
    return (batch["labels"][:, 1:] != -100).sum()


def mean_over(name, trainer):
    """The share of a micro-batch in its window's loss: by its tokens in SFT, by micro-batches in DPO."""

    def share(window, i):
        loss = trainer.compute_loss(trainer.model, copy.deepcopy(window[i]))
        if name == "DPO":
            return loss / len(window)
        return loss * labels_in(window[i]) / sum(map(labels_in, window))

    return share


COUNTED = {
    "SFT": ("num_tokens", "entropy", "mean_token_accuracy"),
    "DPO": ("num_tokens", "entropy", "mean_token_accuracy", "rewards/margins", "logps/chosen", "logits/rejected"),
}
HOW = [
    pytest.param("SFT", "mixin", id="SFT-mixin"),
    pytest.param("SFT", "patch", id="SFT-patch"),
    pytest.param("DPO", "patch", id="DPO-patch"),
]


@SCOPES
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("name", "how"), HOW)
@pytest.mark.compat("Trainer behaviour", "trl: SFT and DPO, and what they count")
def test_trl(preferences, name, how, scope, k, monkeypatch):
    def run(sharp, **more):
        more = {"sam_scope": scope, **more} if sharp else more
        return finished(preferences(name, how if sharp else None, gradient_accumulation_steps=k, **more))

    def by_hand(real, of=scope, as_if=name, **more):
        stock = preferences(name)
        stock.model.train()
        share = mean_over(as_if, stock)
        return ByHand([(list(stock.model.parameters()), LR)], share, scope=of, **more).run(real.windows)

    stock = assert_stock_at_small_radii(run, keys=("loss", *COUNTED[name]))
    real = run(True, sam_rho=RHO)
    assert (by_hand(real, rho=0.0) - weights(stock.trainer.model.parameters())).abs().max() < 1e-10
    wrong = [weights(stock.trainer.model.parameters()), by_hand(real, fresh=True)]
    if k > 1:
        wrong += [by_hand(real, of={"batch": "microbatch", "microbatch": "batch"}[scope])]
        wrong += [by_hand(real, as_if="DPO")] if name == "SFT" else []  # micro-batches have tokens unequally
    assert_follows(weights(real.trainer.model.parameters()), by_hand(real), *wrong)

    # What is counted in the first step is that of the weights w, once.
    assert [entry["num_tokens"] for entry in real.logs] == [entry["num_tokens"] for entry in stock.logs]
    for key in COUNTED[name]:
        assert real.logs[0][key] == pytest.approx(stock.logs[0][key], abs=1e-9)
    monkeypatch.setattr(counters, "COUNTERS", ())  # the control
    twice = run(True, sam_rho=RHO)
    assert twice.logs[0]["num_tokens"] == 2 * stock.logs[0]["num_tokens"]
    assert abs(twice.logs[0]["entropy"] - stock.logs[0]["entropy"]) > 1e-6


@pytest.mark.compat("Trainer behaviour", "trl: DPO behind the mixins")
def test_dpo_behind_the_mixins(preferences):
    stock = finished(preferences("DPO"))
    tiny = finished(preferences("DPO", "mixin", sam_rho=1e-10))
    assert (tiny.weights - stock.weights).abs().max() < 1e-8
    real = finished(preferences("DPO", "mixin", sam_rho=RHO))
    assert (real.weights - stock.weights).abs().max() > 1e-6


@pytest.mark.slow
def test_trl_under_patch_is_what_is_tested_here(preferences):
    """The order of classes, of which the tests above have made their own."""
    code = "import adasam_hf; adasam_hf.patch(); import trl; print(*(c.__name__ for c in trl.DPOTrainer.__mro__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    emulated = [cls.__name__ for cls in type(preferences("DPO", "patch")).__mro__[1:]]
    found = done.stdout.split()
    where = emulated.index("AdaSAMTrainer")
    assert found[where] == "Trainer" and found[:where] + found[where + 1 :] == emulated


# ---- trl, where the ascent sees a share of the rows ----


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("name", "how"), HOW)
@pytest.mark.compat("Trainer behaviour", "trl: `sam_preset=fast` takes rows of SFT and pairs of DPO")
def test_fast_with_trl(preferences, name, how, k):
    size = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": k, "max_steps": 2, "dropout": 0.0}
    real = finished(preferences(name, how, sam_preset="fast", sam_rho=RHO, **size))
    assert {entry["sam_ascent_share"] for entry in real.logs} == {2 / (8 * k)}
    assert_follows(weights(real.trainer.model.parameters()), *chosen_by_hand(preferences, name, real, k))
    stock, tiny, zero = (
        finished(preferences(name, how, **size, **more))
        for how, more in (
            (None, {}),
            (how, {"sam_preset": "fast", "sam_rho": 1e-10}),
            (how, {"sam_preset": "fast", "sam_rho": 0.0}),
        )
    )
    assert (tiny.weights - stock.weights).abs().max() < 1e-8
    assert torch.equal(zero.weights, stock.weights)
    assert (real.weights - stock.weights).abs().max() > 1e-6


def chosen_by_hand(preferences, name, real, k, choices=((0, 4), (0, 1), range(8)), **flags):
    """The run by hand, for each choice of rows of the last micro-batch of a window."""
    found = []
    for positions in choices:
        stock = preferences(name, **{"dropout": 0.0} | flags)
        stock.model.train()

        def ascent(step, window, part, positions=positions, stock=stock):
            rows = real.seen.rows[step * k + max(part)]
            return stock.compute_loss(stock.model, real.seen.collator([copy.deepcopy(rows[i]) for i in positions]))

        loop = ByHand([(list(stock.model.parameters()), LR)], mean_over(name, stock), ascent=ascent)
        found.append(loop.run(real.windows))
    return found


@pytest.mark.parametrize("how", ["mixin", "patch"])
@pytest.mark.compat("Trainer behaviour", "trl: `sam_preset=fast` takes whole sequences of packed rows")
def test_fast_with_packed_rows(preferences, how):
    size = {"padding_free": True, "per_device_train_batch_size": 8, "max_steps": 2, "max_length": None, "dropout": 0.0}
    real = finished(preferences("SFT", how, sam_preset="fast", sam_rho=RHO, **size))
    assert len(real.windows[0][0]["input_ids"]) == 1 and (real.windows[0][0]["position_ids"] == 0).sum() == 8
    lengths = [[len(row["input_ids"]) for row in rows] for rows in real.seen.rows]
    shares = [(n[0] + n[4]) / sum(n) for n in lengths[:2]]
    assert [entry["sam_ascent_share"] for entry in real.logs] == pytest.approx(shares)
    runs = chosen_by_hand(preferences, "SFT", real, 1, **size)
    assert_follows(weights(real.trainer.model.parameters()), *runs)


# ---- sequence to sequence ----


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.1}
    size = {"vocab_size": 3 + len(WORDS), "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 2}
    special = {"bos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**size, **sizes, **heads, **special)).double()


def smoothed(smoothing, by_batch):
    """A micro-batch's share of the window's loss, −(1 − ε) log p + ε · mean of −log p.

    It is the mean over the window's labels, as the Trainer's own smoother has it; `by_batch` the sum of the means of
    micro-batches, as BART has it, which takes `num_items_in_batch` and does not divide by it.
    """

    def loss(model, window, i):
        batch = copy.deepcopy(window[i])
        labels = batch.pop("labels")
        log_p = model(**batch).logits.log_softmax(-1)[labels != -100]
        likely = log_p.gather(1, labels[labels != -100][:, None]).sum()
        total = -(1 - smoothing) * likely - smoothing * log_p.mean(-1).sum()
        return total / sum((one["labels"] != -100).sum() for one in ([window[i]] if by_batch else window))

    return loss


@SCOPES
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.compat("Trainer behaviour", "`Seq2SeqTrainer`, with label smoothing and accumulation")
def test_seq2seq(tmp_path, tokenizer, scope, k, smoothing):
    texts = [(row_of_words(i, 3 + i % 6), row_of_words(i + 40, 2 + i % 5)) for i in range(32)]
    rows = [{"input_ids": tokenizer(a).input_ids, "labels": [*tokenizer(b).input_ids, 2]} for a, b in texts]

    def run(sharp, **more):
        kind, arguments = (Seq2SeqTrainer, Seq2SeqTrainingArguments)
        if sharp:
            kind, arguments = AdaSAMSeq2SeqTrainer, AdaSAMSeq2SeqTrainingArguments
            more = {"sam_scope": scope, **more}
        model = bart()
        args = arguments(**flags(tmp_path, label_smoothing_factor=smoothing, gradient_accumulation_steps=k, **more))
        return finished(kind(model, args, DataCollatorForSeq2Seq(tokenizer, model), train_dataset=rows))

    def by_hand(real, of=scope, epsilon=smoothing, by_batch=not smoothing, **more):
        model, loss = bart().train(), smoothed(epsilon, by_batch)
        params = list(model.parameters())
        return ByHand([(params, LR)], lambda window, i: loss(model, window, i), scope=of, **more).run(real.windows)

    def of_model(run):
        return weights(run.trainer.model.parameters())

    stock = assert_stock_at_small_radii(run)
    real = run(True, sam_rho=RHO)
    wrong = [of_model(stock), by_hand(real, fresh=True), by_hand(real, epsilon=0.1 - smoothing)]
    if k > 1:
        wrong += [by_hand(real, of={"batch": "microbatch", "microbatch": "batch"}[scope])]
        wrong += [by_hand(real, by_batch=bool(smoothing))]
    assert_follows(of_model(real), by_hand(real), *wrong)
