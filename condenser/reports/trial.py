"""One model trained in several ways, step by step: by the authors' recipe, by ours, compiled, and replayed."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, StepBatch, Vocabulary
from condenser.data.datamodule import StepLoader, Steps
from condenser.data.mixing import Mixture
from condenser.models.attention import put
from condenser.models.condenser import Condenser
from condenser.models.flops import Work
from condenser.models.objective import COUNTS, Term
from condenser.training.step import TrainingStep

FIRST = 4  # steps that do not count
Precision = Literal["32-true", "bf16-mixed"]
Figures = dict[str, list[float]]  # of each round
KINDS = {  # of GPU kernels, by what their names contain; the first match counts
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "xmma", "cublas"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("FusedAdam", "fused_adam", "multi_tensor", "foreach"),
    "copies": ("Memcpy", "Memset", "copy_kernel"),
}


@dataclass(frozen=True)
class Recipe:
    """What is done in a step."""

    name: str
    authors: bool = False  # padded to the longest row of all, whole layers, all logits, one micro-batch at a time
    compiled: bool = False
    replayed: bool = False


RECIPES = (
    Recipe("authors' recipe", authors=True),
    Recipe("flat, pruned"),
    Recipe("+ compiled", compiled=True),
    Recipe("+ replayed", compiled=True, replayed=True),
)


class Authors(Condenser):
    """The loss as the published code computes it: Hugging Face's layers over padded rows, every position scored."""

    longest = 0  # tokens of the longest row of all

    def losses(self, batch: dict[str, Any], score: bool = False) -> dict[str, Term]:
        bounds = batch["cu_seqlens"]
        n, length = len(bounds) - 1, self.longest
        row = torch.bucketize(torch.arange(len(batch["input_ids"]), device=bounds.device), bounds, right=True) - 1
        slots = row * length + batch["position_ids"]
        ids, real = (
            put(each, slots, n * length).view(n, length) for each in (batch["input_ids"], row.new_ones(len(row)))
        )
        labels = put(batch["labels"] + 100, slots[batch["masked_index"]], n * length) - 100
        embeddings, layers = self.backbone.embeddings, self.backbone.layers
        early = late = embeddings(ids)
        mask = real[:, None, None, :].bool()
        for depth, layer in enumerate(layers, start=1):
            late = layer(late, mask)
            early = late if depth == self.skip_from else early
        head = torch.cat([late[:, :1], early[:, 1:]], dim=1)
        for layer in self.c_head:
            head = layer(head, mask)
        logits = {name: self.backbone.mlm_head({"mlm": late, "head_mlm": head}[name]) for name in self.terms}
        return {
            name: Term(F.cross_entropy(each.flatten(0, 1).float(), labels, reduction="sum"))
            for name, each in logits.items()
        }


class Mixed(Steps):
    """The same samples in the same steps, but micro-batches of any lengths, each a pass."""

    def parts(self, step: int) -> list[np.ndarray]:
        parts = self.batches.step(step)
        return np.array_split(np.random.default_rng(step).permutation(np.concatenate(parts)), len(parts))


@dataclass
class Trial:
    """A model, and the rows that it is trained on."""

    model: Condenser
    precision: Precision
    steps: int  # of a recipe in a round
    workers: int
    tokens_per_pass: int
    data: tuple[Mixture, BucketedBatches, Vocabulary]

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32
        self.kernels: dict[str, dict[str, float]] = {}  # milliseconds a step by kind, of each recipe, on a GPU

    def run(self, recipes: list[Recipe], rounds: int, say: Callable[[str], Any] = print) -> dict[str, Figures]:
        """Figures of each round by recipe. Some steps of each that do not count come first."""
        found, steps = dict[str, Figures](), {}
        for recipe in recipes:
            say(f"first steps: {recipe.name}")
            steps[recipe.name] = self.step_of(recipe)
            found[recipe.name] = self.profile(recipe, steps[recipe.name])
        for number in range(rounds):
            for recipe in recipes:
                say(f"round {number + 1} of {rounds}: {recipe.name}")
                for name, value in self.measure(recipe, steps[recipe.name], FIRST + number * self.steps).items():
                    found[recipe.name].setdefault(name, []).append(value)
        return found

    def step_of(self, recipe: Recipe) -> TrainingStep:
        model = self.model
        objective = Authors(model.lm, model.c_head, model.skip_from, model.late_mlm, False) if recipe.authors else model
        fused = None if recipe.authors else True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
        return TrainingStep(objective, optimizer, clip=1.0, compiled=recipe.compiled, replayed=recipe.replayed)

    def loader(self, recipe: Recipe, first: int) -> StepLoader:
        mixture, batches, vocabulary = self.data
        kind, n = (Mixed, 1) if recipe.authors else (Steps, self.tokens_per_pass)
        steps = kind(mixture, batches, vocabulary, Masking(0), (0, 1), n, few_shapes=recipe.compiled)
        loader = StepLoader(steps, training=True, num_workers=self.workers)
        loader.load_state_dict({"position": first})
        return loader

    def take(self, step: TrainingStep, batch: StepBatch) -> None:
        counts = torch.tensor([batch.total(name) for name in COUNTS], dtype=torch.float32)
        batch, scale = batch.to(self.device), (1 / counts).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            step.take(batch, scale)

    def measure(self, recipe: Recipe, step: TrainingStep, first: int) -> dict[str, float]:
        step.gradients[0].zero_()
        loader, compiled = self.loader(recipe, first), torch._dynamo.utils.counters["stats"]["unique_graphs"]
        items = iter(loader)
        batch, tokens, needed, done, positions, host = next(items), 0, 0.0, 0.0, 0, 0.0
        if self.workers:
            time.sleep(1.0)  # until they are ahead, as they are in training
        loader.waited, start = 0.0, time.perf_counter()
        for number in range(self.steps):
            began = time.perf_counter()
            self.take(step, batch)
            host += time.perf_counter() - began
            tokens += batch.total("n_tokens")
            positions += self.positions(recipe, batch)
            needed += self.model.flops(Work.needed(batch))
            done += self.model.flops(self.work_done(recipe, batch))
            if number + 1 < self.steps:
                batch = next(items)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / positions,
            "data_wait": loader.waited / seconds,
            "host_ms": 1e3 * host / self.steps,
            "flops_per_token": done / tokens,
            "needed_flops_per_second": needed / seconds,
            "recompilations": torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled,
        }

    def positions(self, recipe: Recipe, batch: StepBatch) -> int:
        return Authors.longest * batch.total("n_sequences") if recipe.authors else batch.n_positions

    def work_done(self, recipe: Recipe, batch: StepBatch) -> Work:
        """What a recipe computes, padding, dummies and whole layers included."""
        area = self.positions(recipe, batch)
        if recipe.authors:
            pairs = area * Authors.longest
            return Work(area, pairs, area, pairs, area)
        more = area / batch.total("n_tokens")
        return Work(*(round(more * each) for each in Work.needed(batch)))

    def profile(self, recipe: Recipe, step: TrainingStep) -> Figures:
        """Of one of the first steps: bytes at the most (weights, gradients, optimizer states and whatever it needs),
        launches, and on a GPU the time of kernels by kind."""
        items = iter(self.loader(recipe, 0))
        on_gpu = self.device.type == "cuda"
        for _ in range(FIRST - 1 if recipe.compiled else 1):  # until every shape has been compiled
            self.take(step, next(items))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with without_stderr(), torch.profiler.profile(profile_memory=not on_gpu) as profiler:
            self.take(step, next(items))
            if on_gpu:
                torch.cuda.synchronize()
        events: Any = profiler.profiler
        if on_gpu:
            kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            times: Counter[str] = Counter()
            for event in kernels:
                times[kind_of(event.name)] += event.device_time_total / 1e3
            self.kernels[recipe.name] = dict(times)
            names = [event.name for event in profiler.events()]
            launches = sum(name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for name in names)
            return {"peak_memory_gb": [torch.cuda.max_memory_allocated() / 1e9], "launches": [launches]}
        allocated = [event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"]
        states = [state for each in step.optimizer.state.values() for state in each.values() if torch.is_tensor(state)]
        kept = sum(each.numel() * each.element_size() for each in [*step.weights, *step.gradients, *states])
        operations = [e for e in profiler.events() if e.name.startswith("aten::") and not within_another(e)]
        peak = kept + max(0, int(np.cumsum(allocated).max()))
        return {"peak_memory_gb": [peak / 1e9], "launches": [len(operations)]}


def within_another(event: Any) -> bool:
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "element-wise")


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """The profiler's library notes there that it begins and ends, whatever it is told."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products: the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 5 * 2 * n**3 / (time.perf_counter() - start))
    return best
