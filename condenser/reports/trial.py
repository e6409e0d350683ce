"""One model trained in several ways, step by step: by the authors' recipe, by ours, compiled, and replayed."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from condenser.data.collate import StepBatch
from condenser.data.steps import StepLoader, Steps
from condenser.data.store import SPECIAL_TOKENS
from condenser.models.attention import put
from condenser.models.condenser import Condenser
from condenser.models.flops import Work
from condenser.models.objective import COUNTS, Objective, Term
from condenser.training.replay import tensors
from condenser.training.step import TrainingStep

FIRST = 4  # steps that do not count
Precision = Literal["32-true", "bf16-mixed"]
Figures = dict[str, list[float]]  # of each round
LAUNCHES = {"cuda": ("cudaLaunch", "cuLaunch", "cudaGraphLaunch"), "cpu": "aten::"}  # how their names begin
KINDS = {  # of GPU kernels, by what their names contain; the first match counts
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "xmma", "cublas"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("FusedAdam", "fused_adam", "multi_tensor", "foreach"),
    "copies": ("Memcpy", "Memset", "copy_kernel"),
    "element-wise": ("",),
}


@dataclass(frozen=True)
class Recipe:
    """What is done in a step."""

    name: str
    authors: bool = False  # padded to the longest row of all, whole layers, all logits, one micro-batch at a time
    mlm: bool = False  # the backbone's own loss alone
    compiled: bool = False
    replayed: bool = False


FASTER = (Recipe("+ compiled", compiled=True), Recipe("+ replayed", compiled=True, replayed=True))
RECIPES = (Recipe("authors' recipe", authors=True), Recipe("flat, pruned"), *FASTER)


class Authors(Condenser):
    """The loss as the published code computes it: Hugging Face's layers over padded rows, every position scored."""

    longest = 0  # tokens of the longest row of all

    @classmethod
    def of(cls, model: Condenser, longest: int) -> "Authors":
        """With the same weights."""
        made = cls(model.lm, model.skip_from, len(model.c_head), model.late_mlm, pruned=False)
        made.c_head, made.longest = model.c_head, longest
        return made.train(model.training)

    def losses(self, batch: dict[str, Any], score: bool = False) -> dict[str, Term]:
        bounds = batch["cu_seqlens"]
        n, length = len(bounds) - 1, self.longest
        row = torch.bucketize(torch.arange(len(batch["input_ids"]), device=bounds.device), bounds, right=True) - 1
        slots = row * length + batch["position_ids"]
        ids = put(batch["input_ids"], slots, n * length).view(n, length)
        real = put(row.new_ones(len(row)), slots, n * length).view(n, length)
        labels = put(batch["labels"] + 100, slots[batch["masked_index"]], n * length) - 100
        early = late = self.backbone.embeddings(ids)
        mask = real[:, None, None, :].bool()
        for depth, layer in enumerate(self.backbone.layers, start=1):
            late = layer(late, mask)
            early = late if depth == self.skip_from else early
        head = torch.cat([late[:, :1], early[:, 1:]], dim=1)
        for layer in self.c_head:
            head = layer(head, mask)
        states = {"mlm": late, "head_mlm": head}
        logits = {name: self.backbone.mlm_head(states[name]).flatten(0, 1).float() for name in self.streams}
        return {name: Term(F.cross_entropy(each, labels, reduction="sum")) for name, each in logits.items()}


class Mixed(Steps):
    """The same samples in the same steps, but micro-batches of any lengths, each a pass."""

    def parts(self, step: int) -> list[np.ndarray]:
        parts = self.batches.step(step)
        return np.array_split(np.random.default_rng(step).permutation(np.concatenate(parts)), len(parts))


@dataclass
class Trial:
    """A model, and the rows that it is trained on."""

    model: Objective
    rows: Steps  # whose samples, order and masks are those of all recipes
    precision: Precision
    steps: int  # of a recipe in a round
    workers: int
    tokens_per_pass: int

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32
        self.kernels: dict[str, dict[str, float]] = {}  # milliseconds a step by kind, of each recipe, on a GPU
        self.longest = int(self.rows.mixture.typical_lengths().max()) + SPECIAL_TOKENS  # row, in tokens

    def run(self, recipes: list[Recipe], rounds: int, say: Callable[[str], Any] = print) -> dict[str, Figures]:
        """Figures of each round by recipe. Some steps of each that do not count come first."""
        found, steps = dict[str, Figures](), {}
        for recipe in recipes:
            say(f"first steps: {recipe.name}")
            steps[recipe.name] = self.step_of(recipe)
            found[recipe.name] = self.profile(recipe, steps[recipe.name], FIRST + rounds * self.steps)
        for number in range(rounds):
            for recipe in recipes:
                say(f"round {number + 1} of {rounds}: {recipe.name}")
                for name, value in self.measure(recipe, steps[recipe.name], FIRST + number * self.steps).items():
                    found[recipe.name].setdefault(name, []).append(value)
        return found

    def step_of(self, recipe: Recipe) -> TrainingStep:
        objective: Any = self.model
        if recipe.mlm:
            objective = Condenser(objective.lm, n_head_layers=0).train()
        elif recipe.authors:
            objective = Authors.of(objective, self.longest)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, fused=None if recipe.authors else True)
        return TrainingStep(objective, optimizer, clip=1.0, compiled=recipe.compiled, replayed=recipe.replayed)

    def loader(self, recipe: Recipe, first: int) -> StepLoader:
        rows, kind = self.rows, Mixed if recipe.authors else Steps
        steps = kind(
            rows.mixture,
            rows.batches,
            rows.vocabulary,
            rows.masking,
            tokens_per_pass=1 if recipe.authors else self.tokens_per_pass,
            few_shapes=recipe.compiled,
            few_sizes=not recipe.authors and self.device.type == "cpu" and self.precision == "bf16-mixed",
            extras=self.model.asks,
        )
        return StepLoader(steps, True, self.workers, lambda: first)

    def take(self, step: TrainingStep, batch: StepBatch) -> None:
        counts = torch.tensor([batch.total(name) for name in COUNTS], dtype=torch.float32)
        batch, scale = batch.to(self.device), (1 / counts).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            step.take(batch, scale)

    def measure(self, recipe: Recipe, step: TrainingStep, first: int) -> dict[str, float]:
        loader = self.loader(recipe, first - 1)
        items, batches, host = iter(loader), [], 0.0
        next(items)
        if self.workers:
            time.sleep(1.0)  # until they are ahead, as they are in training
        waited, start = loader.waited, time.perf_counter()
        for batch in islice(items, self.steps):
            began = time.perf_counter()
            self.take(step, batch)
            host += time.perf_counter() - began
            batches.append(batch)
        torch.get_device_module(self.device).synchronize()
        seconds = time.perf_counter() - start
        tokens, flops = sum(batch.total("n_tokens") for batch in batches), step.objective.flops
        return {
            "tokens_per_second": tokens / seconds,
            "data_wait": (loader.waited - waited) / seconds,
            "host_ms": 1e3 * host / self.steps,
            "flops_per_token": sum(flops(self.work_done(recipe, batch)) for batch in batches) / tokens,
            "needed_flops_per_second": sum(flops(Work.of_real_tokens(batch)) for batch in batches) / seconds,
        }

    def profile(self, recipe: Recipe, step: TrainingStep, n_steps: int) -> Figures:
        """Of a step: bytes at the most (weights, gradients, optimizer states and whatever it needs), launches, and on a
        GPU the time of kernels by kind. Before it, passes of all shapes that come in ``n_steps`` are computed once."""
        on_gpu, seen = self.device.type == "cuda", set[tuple[torch.Size, ...]]()
        if on_gpu:  # of the first steps too, as a replay keeps what it was captured in
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for batch in islice(self.loader(recipe, 0), n_steps if recipe.compiled else 1):
            shapes = {tuple(value.shape for value in tensors(fields)) for fields in batch}
            if not shapes <= seen:
                self.take(step, batch)
                seen |= shapes
        with without_stderr(), torch.profiler.profile(profile_memory=not on_gpu) as profiler:
            self.take(step, batch)
            torch.get_device_module(self.device).synchronize()
        events = profiler.events()
        if on_gpu:
            self.kernels[recipe.name] = times_by_kind(events)
        peak = torch.cuda.max_memory_allocated() if on_gpu else kept(step) + allocated_at_most(profiler)
        launches = sum(event.name.startswith(LAUNCHES[self.device.type]) for event in events)
        return {"peak_memory_gb": [peak / 1e9], "launches": [launches]}

    def work_done(self, recipe: Recipe, batch: StepBatch) -> Work:
        """What a recipe computes, padding, dummies and whole layers included."""
        if recipe.authors:
            positions = self.longest * batch.total("n_sequences")
            pairs = positions * self.longest
            return Work(positions, pairs, positions, pairs, positions)
        more = batch.n_positions / batch.total("n_tokens")
        return Work(*(round(more * each) for each in Work.of_real_tokens(batch)))


def kept(step: TrainingStep) -> int:
    """Bytes of weights, gradients and optimizer states."""
    states = [state for each in step.optimizer.state.values() for state in each.values() if torch.is_tensor(state)]
    return sum(each.nbytes for each in [*step.weights, *step.gradients, *states])


def allocated_at_most(profiler: Any) -> int:
    """Bytes, beside what there was before."""
    events = profiler.profiler.kineto_results.events()
    return int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max())


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """The profiler's library notes there that it begins and ends, whatever it is told."""
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def times_by_kind(events: Any) -> dict[str, float]:
    """Milliseconds of GPU kernels."""
    times: Counter[str] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next(kind for kind, parts in KINDS.items() if any(part in event.name for part in parts))
            times[kind] += event.device_time_total / 1e3
    return dict(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products: the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=1.0).times)
