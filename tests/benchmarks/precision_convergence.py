"""Whether every precision mode learns what float32 learns: final evaluation losses, lost updates, bytes per weight.

    python tests/benchmarks/precision_convergence.py --jobs 2

A tiny Llama and a tiny Higgs Audio v2 (text and 8 codebooks) are trained in float32 on noisy chains of tokens, then
fine-tuned on other chains in each mode, with LoRA and in full, at three learning rates, with several seeds, and once
more with the loss divided by 16384: as a mean over as many more tokens, that leaves most FP16 gradients at zero unless
the loss is scaled. All rows of a table see the same data in the same order.

A mode that ends further than 0.005 nats from fp32 does not train the same model, and the script says so and fails.
"""

import argparse
import importlib.metadata
import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

CPU = torch.device("cpu")
SYMBOLS, CODEBOOKS, LENGTH, BATCH = 24, 8, 24, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AUDIO_TOKEN, DELAY_TOKEN = SYMBOLS, SYMBOLS + 1
BOUND = 0.005  # nats
LRS = (1e-3, 5e-5, 1e-5)
DIVISORS = (1.0, 16384.0)
NAMES = {LlamaForCausalLM: "Llama", HiggsAudioV2ForConditionalGeneration: "Higgs"}

Inputs = dict[str, Tensor]


class Row(NamedTuple):
    """A way of training: its name in the table, the settings, and whether it must agree with fp32."""

    name: str
    settings: dict[str, Any]
    bound: bool = True


STOCHASTIC = {"mode": "bf16", "trainable_dtype": "bf16", "masters": "stochastic"}
ROWS = [
    Row("fp32", {"mode": "fp32"}),
    Row("bf16", {"mode": "bf16"}),
    Row("amp_fp16", {"mode": "amp_fp16"}),
    Row("native_fp16, fp32 trainables", {"mode": "native_fp16"}),
    Row("native_fp16, masters", {"mode": "native_fp16", "trainable_dtype": "fp16"}),
    Row("bf16, bf16 trainables, masters", {"mode": "bf16", "trainable_dtype": "bf16"}),
    Row("bf16, bf16 trainables, stochastic", STOCHASTIC),
    Row("bf16, bf16 trainables, none", {"mode": "bf16", "trainable_dtype": "bf16", "masters": "none"}, bound=False),
]


class Job(NamedTuple):
    """One training run."""

    model: str
    tuning: str
    row: int
    lr: float
    divisor: float
    seed: int
    steps: int


class Outcome(NamedTuple):
    """What a run came to.

    Evaluation loss in nats, before and after; windows skipped; shares of the last update's moves that left the stored
    weight, and all that is kept of it, unchanged; bytes per trained weight, of weight, gradient, optimizer state and
    masters or residual.
    """

    start: float
    loss: float
    skipped: int
    lost_in_weights: float
    lost: float
    bytes_per_weight: float


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def higgs() -> nn.Module:
    config = HiggsAudioV2Config(
        vocab_size=SYMBOLS + 2,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=24,
        num_codebooks=CODEBOOKS,
        codebook_size=SYMBOLS + 2,
        audio_stream_bos_id=SYMBOLS,
        audio_stream_eos_id=SYMBOLS + 1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        audio_token_id=AUDIO_TOKEN,
        audio_bos_token_id=0,
        audio_delay_token_id=DELAY_TOKEN,
        use_cache=False,
    )
    model: nn.Module = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    return model


def chain(shape: tuple[int, ...], world: int, generator: torch.Generator) -> Tensor:
    """Tokens (..., LENGTH) of which three in four follow from the one before by a rule, another one in every world."""
    rule = torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(1000 + world))
    tokens = [torch.randint(SYMBOLS, shape, generator=generator)]
    for _ in range(LENGTH - 1):
        noise = torch.randint(SYMBOLS, shape, generator=generator)
        follows = torch.rand(shape, generator=generator) < 0.75
        tokens.append(torch.where(follows, rule[tokens[-1]], noise))
    return torch.stack(tokens, dim=-1)


def llama_batch(world: int, generator: torch.Generator) -> Inputs:
    return {"input_ids": chain((BATCH,), world, generator)}


def higgs_batch(world: int, generator: torch.Generator) -> Inputs:
    """Half text, half frames of codes, each codebook a chain of its own."""
    text = chain((BATCH,), world, generator)
    codes = torch.stack([chain((BATCH,), world + k, generator) for k in range(CODEBOOKS)], dim=-1)
    ids = torch.cat([text, torch.full((BATCH, LENGTH), AUDIO_TOKEN)], dim=1)
    return {"input_ids": ids, "audio_input_ids": codes, "audio_input_ids_mask": torch.ones(BATCH, LENGTH).bool()}


def llama_loss(model: Any, batch: Inputs) -> Tensor:
    logits = model(**batch).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def higgs_loss(model: Any, batch: Inputs) -> Tensor:
    """The mean over audio targets plus the mean over text targets."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(**batch).last_hidden_state
    text = base.text_lm_head(hidden[:, : LENGTH - 1]).float()
    audio = base.audio_lm_head(hidden[:, LENGTH:-1]).float().view(BATCH, LENGTH - 1, CODEBOOKS, -1)
    return F.cross_entropy(text.flatten(0, 1), batch["input_ids"][:, 1:LENGTH].flatten()) + F.cross_entropy(
        audio.flatten(0, 2), batch["audio_input_ids"][:, 1:].flatten()
    )


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "Llama": (llama, llama_batch, llama_loss),
    "Higgs": (higgs, higgs_batch, higgs_loss),
}


def batches(model: str, world: int, seed: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield MODELS[model][1](world, generator)


def pretrained(name: str, seed: int, steps: int) -> Any:
    """The same model for all jobs of a seed, trained in float32 on world 0."""
    torch.manual_seed(seed)
    build, _, loss_of = MODELS[name]
    model = build()
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for batch in itertools.islice(batches(name, 0, seed), steps):
        torch.autograd.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return model


def run(job: Job) -> Outcome:
    """Fine-tune in one mode, and measure."""
    torch.set_num_threads(1)
    loss_of = MODELS[job.model][2]
    model = pretrained(job.model, job.seed, job.steps)
    if job.tuning == "LoRA":
        torch.manual_seed(job.seed)
        model = add_adapter(model, AdapterConfig(rank=8, alpha=16.0, target_modules=TARGETS), [])
    policy = PrecisionPolicy(PrecisionConfig(**ROWS[job.row].settings), CPU, say=lambda sentence: None)
    model = policy.prepare(model)
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=job.lr, weight_decay=0.0)
    start, skipped = score(model, policy, job), 0
    for step, batch in enumerate(itertools.islice(batches(job.model, 100, 10_000 + job.seed), job.steps), start=1):
        applied = False
        while not applied:  # the same rows again, so that all modes apply the same updates but for their rounding
            with policy.autocast():
                loss = loss_of(model, batch) / job.divisor
            policy.backward(loss)
            if step == job.steps:
                size, before = gradient_bytes(policy), snapshot(policy)
            applied = policy.step(optimizer, max_norm=1.0).applied
            skipped += not applied
    lost_in_weights, lost = lost_updates(policy, optimizer, before)
    size += sum(tensor.nbytes for tensor in stored(policy, optimizer))
    trained = sum(weight.numel() for weight in policy.trained.weights.values())
    return Outcome(start, score(model, policy, job), skipped, lost_in_weights, lost, size / trained)


def score(model: Any, policy: PrecisionPolicy, job: Job) -> float:
    """Mean loss of rows that nobody trains on, in nats, computed as training computes."""
    with torch.no_grad(), policy.autocast():
        rows = itertools.islice(batches(job.model, 100, 77), 8)
        losses: list[float] = [MODELS[job.model][2](model, batch).item() for batch in rows]
    return statistics.mean(losses)


def gradient_bytes(policy: PrecisionPolicy) -> float:
    return float(sum(w.grad.nbytes for w in policy.trained.weights.values() if w.grad is not None))


def stored(policy: PrecisionPolicy, optimizer: AdamW) -> Iterator[Tensor]:
    """Everything that stays between two steps for the trained weights."""
    yield from policy.trained.weights.values()
    yield from policy.trained.masters.values()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if value.ndim)


def snapshot(policy: PrecisionPolicy) -> dict[str, tuple[Tensor, Tensor]]:
    weights = policy.trained.weights
    return {name: (weights[name].detach().clone(), policy.trained.value(name).clone()) for name in weights}


def lost_updates(
    policy: PrecisionPolicy, optimizer: AdamW, before: dict[str, tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Shares of the weights that Adam wanted to move and that did not move: as stored, and with all that is kept."""
    wanted = in_weights = at_all = 0
    for name, held in policy.named_parameters():
        moving = optimizer.state[held]["exp_avg"] != 0
        weight, value = before[name]
        wanted += int(moving.sum())
        in_weights += int((moving & (policy.trained.weights[name] == weight)).sum())
        at_all += int((moving & (policy.trained.value(name) == value)).sum())
    return in_weights / wanted, at_all / wanted


def table(jobs: list[Job], outcomes: dict[Job, Outcome], model: str, tuning: str) -> str:
    """A markdown table of one model and one way of tuning."""
    rates = sorted({job.lr for job in jobs}, reverse=True)
    divisors = sorted({job.divisor for job in jobs})
    head = ["mode", *(f"eval loss at lr {lr:g}" for lr in rates)]
    head += [f"furthest from fp32{'' if d == 1 else f', loss / {d:g}'}" for d in divisors]
    head += [
        "windows skipped, most in a run",
        f"updates lost at lr {rates[-1]:g}: stored weight / with what is kept",
        "bytes per trained weight",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    own = [job for job in jobs if (job.model, job.tuning) == (model, tuning)]
    for index in sorted({job.row for job in own}):
        mine = {job: outcomes[job] for job in own if job.row == index}
        cells = [ROWS[index].name]
        for lr in rates:
            losses = [result.loss for job, result in mine.items() if (job.lr, job.divisor) == (lr, divisors[0])]
            cells.append(f"{statistics.mean(losses):.4f}")
        for divisor in divisors:
            cells.append(f"{max(distance(job, outcomes) for job in mine if job.divisor == divisor):.4f}")
        cells.append(str(max(result.skipped for result in mine.values())))
        slow = [result for job, result in mine.items() if job.lr == rates[-1] and job.divisor == divisors[0]]
        cells.append(
            f"{statistics.mean(r.lost_in_weights for r in slow):.1%} / {statistics.mean(r.lost for r in slow):.2%}"
        )
        cells.append(f"{statistics.mean(r.bytes_per_weight for r in slow):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distance(job: Job, outcomes: dict[Job, Outcome]) -> float:
    """How far a run's evaluation loss is from that of fp32 with the same seed, rate and divisor."""
    return abs(outcomes[job].loss - outcomes[job._replace(row=0)].loss)


def all_jobs(options: argparse.Namespace) -> list[Job]:
    jobs = [
        Job(model, tuning, row, lr, divisor, seed, options.steps)
        for model, tuning, row, lr, divisor, seed in itertools.product(
            options.models, options.tunings, range(len(ROWS)), options.lrs, options.divisors, range(options.seeds)
        )
    ]
    # In full fine-tuning native_fp16's default is that with masters.
    return [job for job in jobs if job.tuning == "LoRA" or "fp32 trainables" not in ROWS[job.row].name]


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what the precision modes learn.")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=200, help="of pre-training and of fine-tuning (default: %(default)s)"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tunings", nargs="+", default=["LoRA", "full"], choices=["LoRA", "full"])
    parser.add_argument("--lrs", nargs="+", type=float, default=list(LRS))
    parser.add_argument("--divisors", nargs="+", type=float, default=list(DIVISORS))
    options = parser.parse_args(arguments)
    if min(options.jobs, options.seeds, options.steps) < 1:
        parser.error("--jobs, --seeds and --steps must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run all jobs, print the tables and return 1 if a mode learnt something else than fp32."""
    options = read_arguments(arguments)
    jobs = all_jobs(options)
    if options.jobs == 1:
        results = list(map(run, jobs))
    else:
        with ProcessPoolExecutor(options.jobs) as pool:
            results = list(pool.map(run, jobs))
    outcomes = dict(zip(jobs, results, strict=True))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{options.seeds} seeds, {options.steps} steps, {versions}")
    for model, tuning in itertools.product(options.models, options.tunings):
        starts = [result.start for job, result in outcomes.items() if (job.model, job.tuning) == (model, tuning)]
        print(f"\n{model}, {tuning}; before: {statistics.mean(starts):.4f}\n\n{table(jobs, outcomes, model, tuning)}")
    far = [job for job in jobs if ROWS[job.row].bound and not distance(job, outcomes) <= BOUND]
    for job in far:
        print(f"{ROWS[job.row].name} is {distance(job, outcomes):.4f} nats from fp32 in {job}", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    raise SystemExit(main())
