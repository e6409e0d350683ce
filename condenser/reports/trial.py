"""One model trained in several ways, step by step: the authors' recipe, ours, and what lies between."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, Vocabulary, make_micro_batch
from condenser.data.store import SPECIAL_TOKENS
from condenser.models.attention import padding_mask, run_layer
from condenser.models.backbones.base import parts
from condenser.models.condenser import MODEL_INPUTS, Condenser
from condenser.models.flops import Work, training_flops

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Recipe:
    """What is done in a step."""

    name: str
    masked_only: bool = True  # score the vocabulary at masked positions only
    bucketed: bool = True  # micro-batches of like lengths, padded to their own longest
    pruned: bool = True
    fused_optimizer: bool = True
    packed: bool = False
    fused_loss: bool = False
    compiled: bool = False


class MicroBatches(Dataset):
    """Item i: the micro-batches of step i as a recipe lays them out."""

    def __init__(self, recipe: Recipe, samples: Any, vocabulary: Vocabulary, batches: BucketedBatches):
        self.recipe, self.samples, self.vocabulary, self.batches = recipe, samples, vocabulary, batches
        self.longest = int(samples.lengths.max()) + SPECIAL_TOKENS

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        parts, multiple_of = self.batches.step(step), 1
        if not self.recipe.bucketed:  # the same samples, of any length, padded to the longest of all
            mixed = np.random.default_rng(step).permutation(np.concatenate(parts))
            parts, multiple_of = np.array_split(mixed, len(parts)), self.longest
        layout: Any = "packed" if self.recipe.packed else "padded"
        return [
            make_micro_batch(self.samples.rows(part), part, 0, self.vocabulary, Masking(0), layout, multiple_of)
            for part in parts
        ]


@dataclass
class Trial:
    """A model, and the rows that it is trained on."""

    model: Condenser
    precision: Precision
    steps: int  # of a recipe in a round
    workers: int
    samples: Any
    vocabulary: Vocabulary
    batches: BucketedBatches

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.attention = self.model.lm.config._attn_implementation
        self.optimizers = {
            fused: torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=fused or None) for fused in (True, False)
        }

    def run(self, compared: list[Recipe], rounds: int, console: Any) -> dict[str, dict[str, list[float]]]:
        """Figures of each round by recipe. A step of each that does not count comes first."""
        from rich.progress import Progress

        found: dict[str, dict[str, list[float]]] = {recipe.name: {} for recipe in compared}
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=len(compared) * (rounds + 1))
            for recipe in compared:
                progress.update(task, description=f"memory: {recipe.name}", advance=1)
                found[recipe.name]["peak_memory_gb"] = [self.peak_memory(recipe) / 1e9]
            for number in range(rounds):
                first = 1 + number * self.steps
                for recipe in compared:
                    progress.update(task, description=f"round {number + 1}: {recipe.name}", advance=1)
                    for name, value in self.measure(recipe, range(first, first + self.steps)).items():
                        found[recipe.name].setdefault(name, []).append(value)
        return found

    def measure(self, recipe: Recipe, steps: range) -> dict[str, float]:
        needed, done, area, waited = [], [], 0, 0.0
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        items = self.loader(recipe, steps)
        start = time.perf_counter()
        for _ in steps:
            asked = time.perf_counter()
            micro_batches = next(items)
            waited += time.perf_counter() - asked
            self.train_step(recipe, micro_batches)
            needed += [Work.needed(batch) for batch in micro_batches]
            done += [work_done(recipe, batch) for batch in micro_batches]
            area += sum(batch["area"] for batch in micro_batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        n_tokens = sum(each.tokens for each in needed)
        return {
            "tokens_per_second": n_tokens / seconds,
            "padding": 1 - n_tokens / area,
            "data_wait": waited / seconds,
            "flops_per_token": self.flops(done) / n_tokens,
            "needed_flops_per_second": self.flops(needed) / seconds,
            "recompilations": torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled,
        }

    def loader(self, recipe: Recipe, steps: range) -> Iterator[list[dict[str, Any]]]:
        """The steps; workers have the first of them ready."""
        dataset = MicroBatches(recipe, self.samples, self.vocabulary, self.batches)
        pin, workers = self.device.type == "cuda", self.workers
        items = iter(
            DataLoader(dataset, None, sampler=list(steps), num_workers=workers, pin_memory=pin, collate_fn=as_it_is)
        )
        if workers:
            time.sleep(1.0)
        return items

    def flops(self, work: list[Work]) -> float:
        model = self.model
        return sum(training_flops(model.lm.config, len(model.c_head), model.late_mlm, each) for each in work)

    def train_step(self, recipe: Recipe, micro_batches: list[dict[str, Any]]) -> None:
        loss_sum = self.set_up(recipe)
        n_masked = sum(batch["n_masked"] for batch in micro_batches)
        for batch in micro_batches:
            inputs = {
                name: value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
                loss = loss_sum(inputs)
            (loss / n_masked).backward()
        optimizer = self.optimizers[recipe.fused_optimizer]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=recipe.fused_optimizer or None)
        optimizer.step()
        optimizer.zero_grad()

    def set_up(self, recipe: Recipe) -> Callable[[dict[str, Any]], Tensor]:
        """Make the model a recipe's own; returns its loss."""
        model = self.model
        model.pruned, model.fused_loss, model.run_layer = recipe.pruned, recipe.fused_loss, run_layer
        if recipe.packed:
            model.pack()
        else:
            model.lm.set_attn_implementation(self.attention)
        if recipe.compiled:
            model.compile()
        if recipe.masked_only:
            return lambda batch: model(**{key: value for key, value in batch.items() if key in MODEL_INPUTS}).loss_sum
        return lambda batch: full_loss_sum(model, batch)

    def peak_memory(self, recipe: Recipe) -> float:
        """Bytes at the most in a step: weights, gradients, optimizer states and whatever the step needs."""
        micro_batches = MicroBatches(recipe, self.samples, self.vocabulary, self.batches)[0]
        if recipe.compiled:
            self.train_step(recipe, micro_batches)  # compilers allocate too
        other = self.optimizers[not recipe.fused_optimizer]
        unused = sum(size_of(state.values()) for state in other.state.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.train_step(recipe, micro_batches)
            return torch.cuda.max_memory_allocated() - unused
        with without_stderr(), torch.profiler.profile(profile_memory=True) as profiler:
            self.train_step(recipe, micro_batches)
        events: Any = profiler.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        optimizer = self.optimizers[recipe.fused_optimizer]
        kept = size_of(self.model.parameters()) + sum(size_of(state.values()) for state in optimizer.state.values())
        return kept + max(0, int(np.cumsum(sizes).max()))


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


def as_it_is(item: Any) -> Any:
    return item


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


def full_loss_sum(model: Condenser, batch: dict[str, Any]) -> Tensor:
    """The loss as the published code computes it: every layer whole, all logits of both streams."""
    embeddings, layers, transform, decoder = parts(model.lm)
    early = late = embeddings(batch["input_ids"])
    mask = padding_mask(model.lm.config, late, batch["attention_mask"])
    for depth, layer in enumerate(layers, start=1):
        late = layer(late, mask)
        early = late if depth == model.skip_from else early
    head = torch.cat([late[:, :1], early[:, 1:]], dim=1)
    for layer in model.c_head:
        head = layer(head, mask)
    streams = [late] * model.late_mlm + [head] * (len(model.c_head) > 0)
    targets = batch["labels"].flatten()
    losses = [F.cross_entropy(decoder(transform(each)).flatten(0, 1), targets, reduction="sum") for each in streams]
    return torch.stack(losses).sum()


def work_done(recipe: Recipe, batch: dict[str, Any]) -> Work:
    """What a recipe computes in a micro-batch, padding and whole layers included."""
    if recipe.packed:
        return Work.needed(batch)
    area, width = batch["area"], batch["input_ids"].shape[1]
    whole = Work(area, area * width, area, area * width, batch["n_masked"])
    if recipe.pruned:
        n_queries = batch["query_index"].numel()
        return whole._replace(queries=n_queries, query_pairs=n_queries * width)
    return whole if recipe.masked_only else whole._replace(masked=area)


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
