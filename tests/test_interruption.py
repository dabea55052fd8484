"""Killed, stopped, out of disk: what is left is clean, and what goes on from it is the uninterrupted run, bit for bit.

Signals, full disks and hosts are real. Runs of one process are forked off a server that has imported everything; those
of several processes are launched once for each kind. What they run is in distributed/interrupted.py.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from distributed.interrupted import CASES, DDP, FSDP, SAVES, STEPS, Full, Strike, build, press_ctrl_c, train, weights_of
from safetensors.torch import load_file
from transformers import TrainerCallback

from adasam_hf.checkpoints import last_complete

HERE = Path(__file__).parent
SCRIPT = HERE / "distributed" / "interrupted.py"
ADASAM = [name for name in CASES if name != "adamw"]
slow = pytest.mark.slow
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.bert.modeling_bert"])


def compat(what, scope=None):
    return pytest.mark.compat("Interruption", what, scope=scope)


def both_scopes(what):
    """`case` is AdaSAM in one scope and the other."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=compat(what, scope=CASES[case].get("sam_scope", "batch"))) for case in ADASAM]
    )


def in_process(folder, function, *words, **options) -> int:
    """The exit status, negative for a signal. What the process says is in folder/log."""
    process = forks.Process(target=_logged, args=(folder / "log", function, words, options), daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


def _logged(log, function, words, options):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*words, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the uninterrupted run of a case leaves."""
    runs = {}

    def run(case):
        if case not in runs:
            folder = tmp_path_factory.mktemp("whole")
            assert in_process(folder, train, folder / "out", folder / "result.pt", **CASES[case]) == 0
            runs[case] = torch.load(folder / "result.pt")
            assert len(runs[case]["begun"]) == STEPS
        return runs[case]

    return run


def check_same(got, want, since):
    """`got` went on after step `since` and ended as `want`."""
    assert len(got["begun"]) == STEPS - since
    assert torch.equal(got["weights"], want["weights"])
    assert torch.equal(got["random"], want["random"])
    assert got["logs"] == want["logs"]  # those of process 0, which are saved


def check_resumes(folder, case, want, since):
    """In a new process the run goes on after step `since` and ends as `want`."""
    assert last_complete(folder / "out") == str(folder / "out" / f"checkpoint-{since}")
    assert in_process(folder, train, folder / "out", folder / "result.pt", **CASES[case]) == 0
    check_same(torch.load(folder / "result.pt"), want, since)


def saved_before(step):
    return (step - 1) // SAVES * SAVES


def saved_weights(folder):
    tensors = load_file(Path(folder) / "model.safetensors")
    return torch.cat([tensors[name].reshape(-1) for name, _ in make_model("bert").named_parameters()])


# ---- killed ----


@slow
@pytest.mark.parametrize(
    ("case", "instant"),
    [
        pytest.param(
            case,
            instant,
            marks=compat(f"SIGKILL at a random step {where} × resume", CASES[case].get("sam_scope", "batch"))
            if case in ADASAM
            else (),
        )
        for case in CASES
        for instant, where in {
            "ascent": "in the first pass",
            "descent": "in the second pass",
            "update": "after the update",
            "weights": "while saving",
            "rng": "while saving",
        }.items()
        if (case, instant) != ("adamw", "descent")  # which has none
    ],
)
def test_killed_and_resumed(whole, tmp_path, case, instant):
    strike = Strike.at_random(f"{case} {instant}", instant)
    done = in_process(tmp_path, train, tmp_path / "out", tmp_path / "none", strike=strike, **CASES[case])
    assert done == -signal.SIGKILL
    check_resumes(tmp_path, case, whole(case), saved_before(strike.step))


def killed_and_restarted(folder, cases, *words):
    """What the job said, and what it left of each case."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max_restarts={len(cases)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    # Else restarted workers find the addresses of those before them in the agent's store, and any gloo job may fail
    # or hang (pytorch/pytorch#135712).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", *launcher, str(SCRIPT), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "(tagged with cpu:0)" in done.stderr:
        pytest.skip("this version of Transformers cannot resume DDP on a CPU, whatever the optimizer")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("exitcode: -9") == len(cases)
    return done.stderr, {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return killed_and_restarted(tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return killed_and_restarted(tmp_path_factory.mktemp("fsdp"), FSDP, "--fsdp")


RESTARTED = "a worker SIGKILLed in the {}, restarted by `torchrun --max_restarts`"


@slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("adasam batch", marks=compat("DDP: " + RESTARTED.format("second pass"), "batch")),
        pytest.param("adasam microbatch", marks=compat("DDP: " + RESTARTED.format("save"), "microbatch")),
        "adamw",
    ],
)
def test_ddp_killed_and_restarted(ddp, case):
    log, runs = ddp
    for rank in range(2):
        check_same(runs[f"{case}-killed-{rank}"], runs[f"{case}-whole-{rank}"], saved_before(DDP[case].step))
    if DDP[case].instant == "rng":  # process 0 waited for the other one's file before it declared the checkpoint whole
        assert f"{case} killed/checkpoint-{DDP[case].step} is skipped, as it was not completely saved" in log


@slow
@pytest.mark.parametrize("case", FSDP)
@compat("FSDP2: " + RESTARTED.format("second pass"), "batch")
def test_fsdp2_killed_and_restarted(fsdp, case):
    _, runs = fsdp
    for rank in range(2):
        got = runs[f"{case}-killed-{rank}"]
        assert got["sharded"]
        check_same(got, runs[f"{case}-whole-{rank}"], saved_before(FSDP[case].step))


# ---- asked to stop ----


@slow
@both_scopes("SIGTERM in the second pass × resume")
def test_sigterm(whole, tmp_path, case):
    strike = Strike.at_random(f"{case} SIGTERM", "descent", signal.SIGTERM)
    done = in_process(tmp_path, train, tmp_path / "out", tmp_path / "none", strike=strike, **CASES[case])
    assert done == -signal.SIGTERM
    check_resumes(tmp_path, case, whole(case), saved_before(strike.step))


@slow
@both_scopes("SIGTERM in the second pass with `enable_jit_checkpoint`: clean weights are saved")
def test_sigterm_with_a_checkpoint_just_in_time(whole, tmp_path, case):
    """(It is saved before the update, with the random state after the passes. A stock run resumes no more exactly.)"""
    strike = Strike.at_random(f"{case} in time", "descent", signal.SIGTERM)
    options = {"strike": strike, "enable_jit_checkpoint": True, **CASES[case]}
    assert in_process(tmp_path, train, tmp_path / "out", tmp_path / "result.pt", **options) == 0
    assert len(torch.load(tmp_path / "result.pt")["begun"]) == strike.step
    saved = saved_weights(tmp_path / "out" / f"checkpoint-{strike.step - 1}")
    assert torch.equal(saved, whole(case)["begun"][strike.step - 1])


@slow
@both_scopes("Ctrl-C at random instants of the second pass: clean weights")
def test_ctrl_c(tmp_path, case):
    assert in_process(tmp_path, press_ctrl_c, tmp_path / "out", tmp_path / "found.pt", 10, **CASES[case]) == 0
    found = torch.load(tmp_path / "found.pt")
    assert len(found) >= 5 and any(inside for _, inside in found)
    assert all(clean for clean, _ in found)


# ---- no place to save ----


@slow
@pytest.mark.parametrize("size", [20_000, 60_000], ids=["in the weights", "in the optimizer's state"])
@compat("a full disk (RLIMIT_FSIZE) while saving: an error, the last good checkpoint stays", scope="batch")
def test_full_disk(whole, tmp_path, size):
    options = {"callbacks": [Full(size)], **CASES["adasam batch"]}
    assert in_process(tmp_path, train, tmp_path / "out", tmp_path / "none", **options) == 1
    assert f"{tmp_path}/out/checkpoint-4 is not complete" in (tmp_path / "log").read_text()
    check_resumes(tmp_path, "adasam batch", whole("adasam batch"), 2)


@slow
@compat("an unwritable folder while saving: an error, the last good checkpoint stays", scope="batch")
def test_unwritable_folder(whole, tmp_path):
    """To root all folders are writable, but for one that is a file."""
    obstacle = tmp_path / "out" / "checkpoint-4"
    obstacle.parent.mkdir()
    obstacle.touch()
    assert in_process(tmp_path, train, tmp_path / "out", tmp_path / "none", **CASES["adasam batch"]) == 1
    assert f"File exists: '{obstacle}'" in (tmp_path / "log").read_text()
    obstacle.unlink()
    check_resumes(tmp_path, "adasam batch", whole("adasam batch"), 2)


def in_namespace(kinds, setting, script) -> str:
    """What a shell script says in namespaces of its own, where it may mount and make networks; or skip."""
    command = ["unshare", "--map-root-user", *kinds, "sh", "-c"]
    try:
        allowed = subprocess.run([*command, f"set -e\n{setting}"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if allowed.returncode != 0:
        pytest.skip(f"no namespaces: {allowed.stderr.strip()}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    words = [*command, f"{setting}\n{script}"]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300).stderr


@slow
@compat("a full and a read-only disk (tmpfs) while saving: an error, the last good checkpoint stays", scope="batch")
def test_full_and_read_only_disk(whole, tmp_path):
    disk, result = tmp_path / "disk", tmp_path / "result.pt"
    disk.mkdir()
    code = (
        f"from distributed.interrupted import *; train_on_small_disk(Path('{disk}'), Path('{result}'), optim='adasam')"
    )
    log = in_namespace(["--mount"], f"mount -t tmpfs -o size=300k tmpfs '{disk}'", f'exec {sys.executable} -c "{code}"')
    full, read_only, rest, _ = log.split("exit status ")
    assert f"{disk}/checkpoint-4 is not complete" in full
    assert read_only.startswith("1\n") and f"Read-only file system: '{disk}/checkpoint-4" in read_only
    assert rest.startswith("1\n") and f"{disk}/checkpoint-4 is skipped, as it was not completely saved" in rest
    check_same(torch.load(result), whole("adasam batch"), 2)


# ---- looked at in the middle ----


class Meddler(TrainerCallback):
    """Evaluates and saves in the middle of a window, and looks at what was saved after steps."""

    def __init__(self):
        self.clean = []

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.trainer.evaluate()
        self.trainer.save_model(args.output_dir)
        self.look(saved_weights(args.output_dir))

    def on_save(self, args, state, control, **kwargs):
        self.look(saved_weights(f"{args.output_dir}/checkpoint-{state.global_step}"))

    def look(self, weights):
        self.clean.append(torch.equal(weights, self.trainer.watch.now))


@both_scopes("callbacks that evaluate or save between micro-batches and after steps see clean weights")
def test_callbacks_see_clean_weights(tmp_path, case):
    plain = build(tmp_path / "plain", dropout=0.0, save_strategy="no", **CASES[case])
    plain.train()

    meddler, evaluated, climbed = Meddler(), [], []
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = build(tmp_path / "out", callbacks=[meddler], dropout=0.0, **often, **CASES[case])
    meddler.trainer = trainer

    def look(model, _):
        (climbed if model.training else evaluated).append(torch.equal(weights_of(model), trainer.watch.now))

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    # in 12 steps of 22 micro-batches: 10 times between two of them, and after each step
    assert len(evaluated) == len(meddler.clean) == 22 and all(evaluated) and all(meddler.clean)
    assert len(climbed) == 44 and climbed.count(False) == 22  # while training, half of the passes are at w + δ
    assert torch.equal(weights_of(trainer.model), weights_of(plain.model))


# ---- two hosts ----

NETWORK = """
mount -t tmpfs tmpfs /run
for i in 1 2; do ip netns add host$i; done
ip link add eth0 netns host1 type veth peer name eth0 netns host2
for i in 1 2; do
    ip -n host$i address add 10.0.0.$i/24 dev eth0
    ip -n host$i link set eth0 up
    ip -n host$i link set lo up
    ip netns exec host$i true
done
"""


@slow
@compat("DDP over two hosts (network namespaces): as two processes on one host, bit for bit", scope="batch")
@compat("DDP over two hosts (network namespaces): as two processes on one host, bit for bit", scope="microbatch")
def test_two_hosts(ddp, tmp_path):
    # With a time limit, as an agent may hang at its exit, when all is done and saved (seen once in 40 times).
    log = in_namespace(
        ["--mount", "--net"],
        NETWORK,
        f"""
        export GLOO_SOCKET_IFNAME=eth0
        for i in 1 2; do
            timeout 120 ip netns exec host$i {sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1 \
                --rdzv_backend=c10d --rdzv_id=two --rdzv_endpoint=10.0.0.1:29400 --local_addr=10.0.0.$i \
                --rdzv_conf=is_host=$((2 - i)) {SCRIPT} {tmp_path} --whole &
        done
        wait
        """,
    )
    for case in DDP:
        for rank in range(2):
            assert (tmp_path / f"{case}-whole-{rank}.pt").exists(), log[-4000:]
            check_same(torch.load(tmp_path / f"{case}-whole-{rank}.pt"), ddp[1][f"{case}-whole-{rank}"], 0)
