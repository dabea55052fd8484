"""Features of models, data and the Trainer at a real radius, against a loop written by hand that lacks the feature."""

import math

import pytest
import torch
from conftest import EPS, LR, SeedSteps, Sharp, flat, make_model, make_rows
from helpers import causal_rows
from oracle import Oracle
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments

RHO = 0.05
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
# Renamed within the range of Transformers that the package supports.
CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"


# ---- the loop written by hand ----


def class_loss(model, window, i):
    """Micro-batch i's share of the window's mean loss."""
    batch = {name: x for name, x in window[i].items() if name != "labels"}
    return cross_entropy(model(**batch, return_dict=True).logits, window[i]["labels"]) / len(window)


def token_loss(model, window, i, smoothing=0.0):
    """The same for a causal LM: over all labels of the window, which micro-batches share unequally."""
    logits = model(input_ids=window[i]["input_ids"]).logits[:, :-1]
    labels = [batch["labels"][:, 1:] for batch in window]
    count = sum((x != -100).sum() for x in labels)
    if not smoothing:  # as Transformers has it, in float32
        return cross_entropy(logits.float().flatten(0, 1), labels[i].flatten(), reduction="sum") / count
    log_p, chosen = logits.log_softmax(-1)[labels[i] != -100], labels[i][labels[i] != -100]
    likely = log_p.gather(1, chosen[:, None]).sum()
    return -((1 - smoothing) * likely + smoothing * log_p.mean(-1).sum()) / count


def plus(a, b):
    """Sum of two lists of gradients, of which some are None."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


class ByHand:
    """SAM around the oracle's AMSGrad; only the model's own gradients come from torch.

    The faults: `still` names parameters that count in the norm though they are neither perturbed nor trained; `twice`
    is the position of a gradient that counts twice; `fresh` draws other random numbers in the second pass.
    """

    def __init__(self, model, scope, loss=class_loss, rho=RHO, still=None, twice=None, fresh=False):
        self.model, self.scope, self.loss = model.train(), scope, loss
        self.rho, self.twice, self.fresh = rho, twice, fresh
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        self.moving = [not (still and still(n)) for n, _ in named]
        group = {"lr": LR, "betas": (0.9, 0.98), "eps": EPS, "weight_decay": 0.0, "index": range(len(named))}
        self.oracle = Oracle([p.detach().numpy() for p in self.params], [group])

    def write(self, at):
        for p, x in zip(self.params, at, strict=True):
            p.data.copy_(torch.from_numpy(x))

    def gradient(self, at, window, i):
        self.write(at)
        self.model.zero_grad()
        self.loss(self.model, window, i).backward()
        return [None if p.grad is None else p.grad.numpy().copy() for p in self.params]

    def climb(self, s):
        squares = [0.0 if g is None else (g**2).sum() for g in s]
        if self.twice is not None:
            squares.append(squares[self.twice])
        return [
            x + self.rho * g / math.sqrt(sum(squares)) if moves and g is not None else x
            for x, g, moves in zip(self.oracle.x, s, self.moving, strict=True)
        ]

    def descent(self, window):
        """The window's gradient at w + δ."""
        states, ascents = [], []
        for i in range(len(window)):
            states.append(torch.get_rng_state())
            ascents.append(self.gradient(self.oracle.x, window, i))
        whole = ascents[0]
        for s in ascents[1:]:
            whole = plus(whole, s)
        total = [None] * len(self.params)
        for i, own in enumerate(ascents):
            if not self.fresh:
                torch.set_rng_state(states[i])
            total = plus(total, self.gradient(self.climb(whole if self.scope == "batch" else own), window, i))
        return total

    def update(self, g):
        self.oracle.update([x if moves else None for x, moves in zip(g, self.moving, strict=True)])

    def run(self, batches, k):
        for t in range(0, len(batches), k):
            torch.manual_seed(100 + t // k)  # as SeedSteps does
            self.update(self.descent(batches[t : t + k]))
        self.write(self.oracle.x)
        return flat(self.model)


def batches_of(rows, size=4):
    return [default_data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def sharp(build, model, rows, scope, k=2, kind=Sharp, callbacks=(), **more):
    """A trainer whose run a loop by hand can follow."""
    return build(
        kind,
        model,
        rows,
        callbacks=[SeedSteps(), *callbacks],
        optim="adasam",
        adam_epsilon=EPS,
        sam_rho=RHO,
        sam_scope=scope,
        gradient_accumulation_steps=k,
        **more,
    )


def trained(*args, **kwargs):
    trainer = sharp(*args, **kwargs)
    trainer.train()
    return flat(trainer.model)


def assert_follows(got, right, *wrong, rounding=1e-13):
    """`got` is `right` to float64 rounding, and what each of `wrong` gives it is not."""
    assert (got - right).abs().max() < rounding
    for other in wrong:
        assert (got - other).abs().max() > 1e-7


# ---- heads ----


@SCOPES
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.compat("Model features", "causal language models, with unequal numbers of labels")
def test_causal_head(build, scope, k):
    rows, batches = causal_rows(), batches_of(causal_rows())  # 5 micro-batches, the last of 2 rows
    got = trained(build, opt(), rows, scope, k, mend=False)
    per_batch = ByHand(opt(), scope, lambda model, window, i: token_loss(model, window[i : i + 1], 0) / len(window))
    wrong = [per_batch.run(batches, k)] if k > 1 else []
    assert_follows(got, ByHand(opt(), scope, token_loss).run(batches, k), *wrong)


@SCOPES
@pytest.mark.compat("Model features", "models that return tuples")
def test_tuples(build, scope):
    rows = make_rows(14)
    model = make_model("bert", return_dict=False)
    assert isinstance(model(rows[0]["input_ids"][None]), tuple)
    wrong = ByHand(make_model("bert"), scope, fresh=True)
    assert_follows(
        trained(build, model, rows, scope),
        ByHand(make_model("bert"), scope).run(batches_of(rows), 2),
        wrong.run(batches_of(rows), 2),
    )


# ---- parameters: frozen, tied, adapters ----


def frozen_bert():
    model = make_model("bert")
    for name, p in model.named_parameters():
        p.requires_grad_(not in_embeddings(name))
    return model


def in_embeddings(name):
    return ".embeddings." in name


@SCOPES
@pytest.mark.compat("Model features", "frozen parameters")
def test_frozen_parameters_stay_and_do_not_count(build, scope):
    rows, model, start = make_rows(14), frozen_bert(), frozen_bert()
    got = trained(build, model, rows, scope)
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) is in_embeddings(name), name
    counted = ByHand(make_model("bert"), scope, still=in_embeddings)
    assert_follows(
        got,
        ByHand(frozen_bert(), scope).run(batches_of(rows), 2),
        counted.run(batches_of(rows), 2),
    )


def opt():
    """A causal LM with dropout whose head and embeddings are one parameter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=20)).double()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@SCOPES
@pytest.mark.compat("Model features", "tied weights")
def test_tied_weights_count_once(build, scope):
    rows, batches = causal_rows(), batches_of(causal_rows())
    names = [name for name, _ in opt().named_parameters()]
    twice = ByHand(opt(), scope, token_loss, twice=names.index("model.decoder.embed_tokens.weight"))
    assert_follows(
        trained(build, opt(), rows, scope, mend=False),
        ByHand(opt(), scope, token_loss).run(batches, 2),
        twice.run(batches, 2),
    )


def lora(base=None):
    """Adapters with dropout, beside a new head, on BERT."""
    peft = pytest.importorskip("peft")
    base = make_model("bert") if base is None else base
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"], init_lora_weights="gaussian"
    )
    return peft.get_peft_model(base, config)


def all_trainable(model):
    for p in model.parameters():
        p.requires_grad_(True)
    return model


@SCOPES
@pytest.mark.compat("Model features", "LoRA (PEFT)")
def test_lora_climbs_by_its_adapters_alone(build, scope):
    rows, model, start = make_rows(14), lora(), lora()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    got = trained(build, model, rows, scope)
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) is (name in frozen), name
    counted = ByHand(all_trainable(lora()), scope, still=frozen.__contains__)
    assert_follows(got, ByHand(lora(), scope).run(batches_of(rows), 2), counted.run(batches_of(rows), 2))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@SCOPES
@pytest.mark.compat("Model features", "LoRA (PEFT): resumed run")
def test_lora_resumes(build, tmp_path, scope):
    rows, common = make_rows(22), {"save_strategy": "steps", "save_steps": 2}
    whole = trained(build, lora(), rows, scope, folder="whole", **common)
    trained(build, lora(), rows, scope, folder="cut", callbacks=[Stop()], **common)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "adapter_model.safetensors").exists()
    trainer = sharp(build, lora(), rows, scope, folder="cut", **common)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
    assert torch.equal(flat(trainer.model), whole)


# ---- other ways to the same gradient ----


def checkpointing(reentrant):
    return {
        f"{CHECKPOINTING}_checkpointing": True,
        f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


class Calls:
    """How often a part of the model ran forward in training."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


@SCOPES
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.compat("Model features", "activation (gradient) checkpointing, reentrant and not")
def test_activation_checkpointing(build, scope, reentrant):
    rows, model = make_rows(14), make_model("bert")
    calls = Calls(model.bert.encoder.layer[0].attention)
    got = trained(build, model, rows, scope, **checkpointing(reentrant))
    assert calls.count == 2 * 2 * 4  # each of 4 micro-batches in two passes, and again in their backward passes
    fresh = ByHand(make_model("bert"), scope, fresh=True)
    assert_follows(got, ByHand(make_model("bert"), scope).run(batches_of(rows), 2), fresh.run(batches_of(rows), 2))


@SCOPES
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.compat("Model features", "`torch.compile` (aot_eager)")),
        pytest.param(
            "inductor", marks=[pytest.mark.slow, pytest.mark.compat("Model features", "`torch.compile` (inductor)")]
        ),
    ],
)
def test_compiled_model(build, scope, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, small = make_rows(16), {**NO_DROPOUT, "num_hidden_layers": 1}
    got = trained(build, make_model("bert", **small), rows, scope, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    other = ByHand(make_model("bert", **small), scope, rho=1.01 * RHO)
    right = ByHand(make_model("bert", **small), scope)
    assert_follows(got, right.run(batches_of(rows), 2), other.run(batches_of(rows), 2))


# ---- noise and losses that the Trainer brings ----


def noisy_bert(alpha):
    model = make_model("bert")

    def add_noise(module, inputs, output):
        size = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.empty_like(output).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(add_noise)
    return model


@SCOPES
@pytest.mark.compat("Trainer behaviour", "NEFTune: the same noise in both passes")
def test_neftune(build, scope):
    rows = make_rows(14)
    alpha = 6.0  # 6/√(9·16) is a float32
    got = trained(build, make_model("bert"), rows, scope, neftune_noise_alpha=alpha)
    fresh = ByHand(noisy_bert(alpha), scope, fresh=True)
    assert_follows(got, ByHand(noisy_bert(alpha), scope).run(batches_of(rows), 2), fresh.run(batches_of(rows), 2))


@pytest.mark.skipif(
    "num_items_in_batch" not in LabelSmoother.__call__.__code__.co_varnames,
    reason="in these Transformers smoothed losses of micro-batches are means, and are then summed",
)
@SCOPES
@pytest.mark.compat("Trainer behaviour", "label smoothing of causal language models")
def test_label_smoothing_of_causal_labels(build, scope):
    rows, batches = causal_rows(), batches_of(causal_rows())

    def smoothed(model, window, i):
        return token_loss(model, window, i, smoothing=0.1)

    assert_follows(
        trained(build, opt(), rows, scope, mend=False, label_smoothing_factor=0.1),
        ByHand(opt(), scope, smoothed).run(batches, 2),
        ByHand(opt(), scope, token_loss).run(batches, 2),
        rounding=1e-8,  # Transformers smooths in float32
    )


@SCOPES
@pytest.mark.compat("Trainer behaviour", "`average_tokens_across_devices` on one process")
def test_tokens_are_not_averaged_over_one_device(build, scope):
    on, off = (
        trained(build, opt(), causal_rows(), scope, mend=False, average_tokens_across_devices=value)
        for value in (True, False)
    )
    assert torch.equal(on, off)


# ---- data and loop ----


class Overflow(TrainerCallback):
    """Runs out of memory once, in the second pass of a step, away from w."""

    def __init__(self, model, at_step):
        self.model, self.at_step, self.w, self.starts = model, at_step, None, []
        model.classifier.register_forward_hook(self.check)

    def on_train_begin(self, args, state, control, **kwargs):
        self.starts.append((flat(self.model), self.w))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.w = state.global_step, flat(self.model)

    def check(self, *_):
        if len(self.starts) == 1 and self.step == self.at_step and not torch.equal(flat(self.model), self.w):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")  # what the Trainer looks for


@SCOPES
@pytest.mark.parametrize("at_step", [0, 1])
@pytest.mark.compat("Data and loop", "`auto_find_batch_size`: out of memory in the second pass")
def test_memory_runs_out_in_the_second_pass(build, scope, at_step):
    def run(size, at_step=None):
        model = make_model("bert")
        overflow = Overflow(model, at_step)
        common = {"auto_find_batch_size": True, "lr_scheduler_type": "linear"}
        trainer = sharp(
            build, model, make_rows(22), scope, callbacks=[overflow], per_device_train_batch_size=size, **common
        )
        trainer.train()
        return trainer, overflow

    trainer, overflow = run(4, at_step)
    assert trainer._train_batch_size == 3  # nine tenths of 4
    _, (restart, w) = overflow.starts
    assert torch.equal(restart, w)
    if at_step == 0:  # later, as in stock, the steps before count
        small, _ = run(3)
        assert torch.equal(flat(trainer.model), flat(small.model))
        assert training_logs(trainer) == training_logs(small)
        assert not torch.equal(flat(trainer.model), flat(run(4)[0].model))


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def padded(rows):
    """A batch of sentences of several lengths."""
    inputs = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": inputs,
        "attention_mask": (inputs > 0).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


@SCOPES
@pytest.mark.compat("Data and loop", "`train_sampling_strategy=group_by_length`")
def test_group_by_length(build, scope):
    rows = [{**row, "input_ids": row["input_ids"][: 2 + i * 7 % 8]} for i, row in enumerate(make_rows(22))]

    def run(kind, strategy, **more):
        seen = []

        def collate(rows):
            seen.append(padded(rows))
            return seen[-1]

        model = make_model("bert", **NO_DROPOUT)
        trainer = build(
            kind,
            model,
            rows,
            callbacks=[SeedSteps()],
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            train_sampling_strategy=strategy,
            **more,
        )
        trainer.data_collator = collate
        trainer.train()
        return seen, flat(model)

    ours = {"optim": "adasam", "adam_epsilon": EPS, "sam_rho": RHO, "sam_scope": scope}
    stock, _ = run(Trainer, "group_by_length")
    grouped, got = run(AdaSAMTrainer, "group_by_length", **ours)
    shuffled, _ = run(AdaSAMTrainer, "random", **ours)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(stock, grouped, strict=True))
    padding = [sum((batch["attention_mask"] == 0).sum() for batch in seen) for seen in (grouped, shuffled)]
    assert padding[0] < padding[1] / 2
    assert_follows(got, ByHand(make_model("bert", **NO_DROPOUT), scope).run(grouped, 2))


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        yield from make_rows(self.count)


@SCOPES
@pytest.mark.parametrize("count", [16, 22], ids=["full windows", "short last window"])
@pytest.mark.compat("Data and loop", "iterable datasets, sized by `max_steps`")
def test_unsized_data(build, scope, count):
    """A window that the data's end cuts short ends without an update, and its gradient joins the next, as in stock."""
    k, steps = 4, 3
    batches = batches_of(make_rows(count))

    def run_by_hand(keep):
        hand, left, step = ByHand(make_model("bert"), scope), None, 0
        while step < steps:
            for t in range(0, len(batches), k):
                torch.manual_seed(100 + step)
                g = hand.descent(batches[t : t + k])
                if left is not None and keep:
                    g = plus(left, g)
                left = g if len(batches[t : t + k]) < k else None
                if left is None:
                    hand.update(g)
                    step += 1
                    if step == steps:
                        break
        hand.write(hand.oracle.x)
        return flat(hand.model)

    got = trained(build, make_model("bert"), Stream(count), scope, k, kind=AdaSAMTrainer, max_steps=steps)
    assert_follows(got, run_by_hand(keep=True), *([run_by_hand(keep=False)] if count == 22 else []))


@SCOPES
@pytest.mark.compat("Data and loop", "`torch_empty_cache_steps`: in both passes")
def test_emptying_the_cache(build, scope, monkeypatch):
    rows, cleared = make_rows(22), []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: cleared.append(True))
    plain = trained(build, make_model("bert"), rows, scope)
    assert not cleared
    emptied = trained(build, make_model("bert"), rows, scope, torch_empty_cache_steps=2)
    assert len(cleared) == 2 * 2 * 2  # steps 0 and 2 of 2 micro-batches in two passes
    assert torch.equal(plain, emptied)


@SCOPES
@pytest.mark.compat("Combinations", "LoRA × accumulation × activation checkpointing × NEFTune")
def test_all_together(build, scope):
    rows, alpha = make_rows(22), 6.0
    model = lora()
    model.enable_input_require_grads()  # or reentrant checkpointing cuts the adapters off
    got = trained(build, model, rows, scope, 4, neftune_noise_alpha=alpha, **checkpointing(True))
    fresh = ByHand(lora(noisy_bert(alpha)), scope, fresh=True)
    assert_follows(got, ByHand(lora(noisy_bert(alpha)), scope).run(batches_of(rows), 4), fresh.run(batches_of(rows), 4))


# ---- hyperparameter search ----


class Trials(TrainerCallback):
    """What each run trained with, and to what."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, model, optimizer, **kwargs):
        group = optimizer.param_groups[0]
        logs = [entry for entry in state.log_history if "loss" in entry]
        self.runs.append(
            (args.optim, args.sam_rho, args.learning_rate, type(optimizer.optimizer), group, logs, flat(model))
        )


def searcher(tmp_path, trials, fails=None, **kwargs):
    def make(trial):
        model, calls = make_model("bert", torch.float32), []

        def fail(*_):
            calls.append(True)
            if len(calls) == 4:  # the second pass of the second step
                raise RuntimeError("diverged")

        if trial is not None and trial.number == fails:
            model.classifier.register_forward_hook(fail)
        return model

    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    args = AdaSAMTrainingArguments(output_dir=str(tmp_path), **{**common, "optim": "adasam", **kwargs})
    rows = make_rows(12)
    return AdaSAMTrainer(model_init=make, args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[trials])


@SCOPES
@pytest.mark.parametrize("fails", [None, 1], ids=["all finish", "one fails"])
@pytest.mark.compat("Hyperparameter search", "`sam_rho` and `learning_rate`, with Optuna")
def test_search(tmp_path, fails, scope):
    """Each trial is the run that its values alone give, whatever came before it."""
    optuna = pytest.importorskip("optuna", reason="optuna, of the extra `test`, is not installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {"sam_rho": [0.0, 0.05], "learning_rate": [1e-3, 3e-3]}
    trials = Trials()
    best = searcher(tmp_path, trials, fails, sam_scope=scope).hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        backend="optuna",
        n_trials=4,
        sampler=optuna.samplers.GridSampler(space, seed=0),
        catch=(RuntimeError,),
    )
    assert best.hyperparameters.keys() == space.keys()
    assert len({(rho, lr) for _, rho, lr, *_ in trials.runs}) == len(trials.runs) == (4 if fails is None else 3)
    for _, rho, lr, _, group, logs, weights in trials.runs:
        assert (group["rho"], group["lr"]) == (rho, lr)
        assert [entry.get("sam_rho", 0.0) for entry in logs] == [rho] * 3
        alone = Trials()
        searcher(tmp_path, alone, sam_rho=rho, learning_rate=lr, sam_scope=scope).train()
        *_, alone_logs, alone_weights = alone.runs[0]
        assert logs == alone_logs and torch.equal(weights, alone_weights)
    assert len({tuple(weights.tolist()) for *_, weights in trials.runs}) == len(trials.runs)


@SCOPES
@pytest.mark.compat("Hyperparameter search", "`optim`, each with its own defaults, with Optuna")
def test_search_over_optimizers(tmp_path, scope):
    optuna = pytest.importorskip("optuna", reason="optuna, of the extra `test`, is not installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = ["adasam", "adamw_torch", "sam", "amsgrad"]
    trials = Trials()
    searcher(tmp_path, trials, sam_scope=scope).hyperparameter_search(
        hp_space=lambda trial: {"optim": trial.suggest_categorical("optim", names)},
        backend="optuna",
        n_trials=4,
        sampler=optuna.samplers.GridSampler({"optim": names}, seed=0),
    )
    found = {
        optim: (kind, logs[-1].get("sam_rho", 0.0), weights) for optim, _, _, kind, _, logs, weights in trials.runs
    }
    assert {name: (kind.__name__, rho) for name, (kind, rho, _) in found.items()} == {
        "adasam": ("AdaSAM", 0.05),
        "adamw_torch": ("AdamW", 0.0),
        "sam": ("SGD", 0.05),
        "amsgrad": ("AdaSAM", 0.0),
    }
    for name in names:
        alone = Trials()
        searcher(tmp_path, alone, optim=name, sam_scope=scope).train()
        assert torch.equal(found[name][2], alone.runs[0][-1])
