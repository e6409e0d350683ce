"""Token store -> optimizer steps, for Lightning.

One item of the training loader is one optimizer step of one rank: its passes. Which samples they hold and how these are
masked depends on (seed, step) alone, so the loader begins where the trainer stands, the same on every rank and for
any number of workers. Validation depends on no setting of the run: runs of other seeds are compared on the
same tokens.
"""

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from condenser.data.batching import BucketedBatches
from condenser.data.collate import EXTRAS, Masking, Vocabulary
from condenser.data.masking import Unit
from condenser.data.mixing import Mixture
from condenser.data.pairs import Pairs
from condenser.data.steps import StepLoader, Steps
from condenser.data.store import (
    SPECIAL_TOKENS,
    SPLITS,
    TokenStore,
    digest,
    load_array,
    names_of,
    read_manifest,
    tokenizer_hash,
)
from condenser.data.tokenizers import load_tokenizer, tokenizer_files

VALIDATION_SEED = 0
SAMPLES_CHECKED = 16  # by which a masking of the user's is tried


class CondenserDataModule(L.LightningDataModule):
    """Masks dynamically and batches by length.

    Args:
        store: folder that `condenser prepare` wrote.
        stores: instead of one store, several with the passes over each in an epoch; a folder, or a name in data/tokens.
        batch_size: sequences per optimizer step over all devices, on average (steps have equal area).
        micro_batches_per_step: micro-batches of a step over all devices; a multiple of their number. The least memory
            that a step needs goes with batch_size / micro_batches_per_step.
        mask_unit: mask whole words, single tokens, or spans of words.
        mask_probability: share of the tokens to predict.
        mask_rates: shares of these that become [MASK], a random token, or stay as they are.
        masking: class that masks, by its path, where it is one of your own.
        masking_options: its further settings, by name.
        tokens_per_pass: tokens that a device computes at once, as whole micro-batches, of which there is at least one;
            by default one micro-batch on a CPU, and on a GPU 65,536 tokens, or as many as its memory surely holds.
        pairs: two spans of each document in a step, from stores of `prepare --kind spans`; by default where the
            objective contrasts them.
        span_length: tokens of these spans, cut anew each epoch; by default they are the rows as stored.
        num_workers: loader processes per device; the batches do not depend on it.
        seed: seed of order and masks; follows seed_everything.
    """

    def __init__(
        self,
        store: str | None = None,
        stores: dict[str, float] | None = None,
        batch_size: int = 1024,
        micro_batches_per_step: int = 8,
        mask_unit: Unit = "word",
        mask_probability: float = 0.15,
        mask_rates: tuple[float, float, float] = (0.8, 0.1, 0.1),
        masking: type[Masking] | None = None,
        masking_options: dict[str, Any] | None = None,
        tokens_per_pass: int | None = None,
        pairs: bool | None = None,
        span_length: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        if (store is None) == (not stores):
            raise ValueError("give data.store or data.stores, one of them")
        if not all(stores or [store]):
            raise ValueError("data.store is empty: give the folder of a token store")
        self.weights: dict[Path, float] = {}
        for name, weight in ({store: 1.0} if store else stores or {}).items():
            folder = store_folder(name)
            if folder in self.weights:
                raise ValueError(f"data.stores: {folder} is there twice; give its weight once")
            self.weights[folder] = weight
        sizes = {"batch_size": batch_size, "micro_batches_per_step": micro_batches_per_step}
        for name, value in (sizes | {"tokens_per_pass": tokens_per_pass}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        self.batch_size, self.micro_batches_per_step = batch_size, micro_batches_per_step
        self.tokens_per_pass = tokens_per_pass
        # tokens of a pass, and how passes are filled up: the module settles what depends on the device
        self.affordable, self.few_shapes, self.few_sizes = 1, False, False
        self.pairs_wanted, self.span_length = pairs, span_length
        self.pairs = bool(pairs)  # by default as the objective needs
        self.extras: tuple[str, ...] = ()  # what the objective asks for
        self.num_workers, self.seed = num_workers, seed
        usual = {"seed": seed, "probability": mask_probability, "rates": mask_rates, "unit": mask_unit}
        self.masking = (masking or Masking).of(usual, masking_options or {})

    @cached_property
    def tokenizer(self) -> Any:
        """The stores' tokenizer. Raises ValueError if it is not the one that they were made with."""
        folder = next(iter(self.weights))
        made_with = read_manifest(folder)["tokenizer"]["hash"]
        tokenizer = load_tokenizer(folder / "tokenizer")
        if tokenizer_hash(tokenizer) != made_with:
            raise ValueError(f"{folder / 'tokenizer'} is not the one that the store was made with: it has changed")
        return tokenizer

    @cached_property
    def unigram_nats(self) -> torch.Tensor:
        """``-log p`` of each token id under its (add-one smoothed) frequency in the training split, ``[V]``."""
        weighted = [weight * load_array(folder / "token_counts.npy") for folder, weight in self.weights.items()]
        counts = 1.0 + np.sum(weighted, axis=0)
        return torch.from_numpy(np.log(counts.sum()) - np.log(counts)).float()

    def about(self) -> dict[str, Any]:
        """Where the data came from, for checkpoints and exports: plain values of the stores' manifests."""
        manifests = [store.manifest for store in self.stores["train"]]
        first, settings = manifests[0], [manifest["settings"] for manifest in manifests]
        sources = [source for each in settings for source in each["sources"]]
        longest = max(each["max_length"] for each in settings)
        return {
            "settings": first["settings"] | {"sources": sources, "max_length": longest},
            "tokenizer": first["tokenizer"],
            "counts": {key: sum(each["counts"][key] for each in manifests) for key in first["counts"]},
            "stores": {name: self.weights[folder] for folder, name in names_of(self.weights).items()},
        }

    def setup(self, stage: str) -> None:
        check_shared(self.micro_batches_per_step, self.trainer.world_size if self.trainer else 1)
        self.stores = {split: [TokenStore(folder, split) for folder in self.weights] for split in SPLITS}
        self.made: dict[Any, Mixture] = {}
        self.digests = [digest(folder) for folder in self.weights]
        self.tokenizer_files = tokenizer_files(next(iter(self.weights)) / "tokenizer")
        first, *others = self.stores["train"]
        for store in others:
            if store.manifest["tokenizer"] != first.manifest["tokenizer"]:
                raise ValueError(f"{store.folder} and {first.folder} were made with different tokenizers")
        shares = zip(self.weights.values(), self.stores["train"], strict=True)
        if not any(weight and len(store) for weight, store in shares):
            raise ValueError(f"{', '.join(map(str, self.weights))}: nothing to train on, no rows or no weight")
        if type(self.masking) is not Masking:
            some = next(store for store in self.stores["train"] if len(store))
            self.masking.check(some.rows(np.arange(min(SAMPLES_CHECKED, len(some)))), Vocabulary.of(self.tokenizer))

    @property
    def train(self) -> Mixture:
        return self.samples("train", list(self.weights.values()))

    @property
    def validation(self) -> Mixture:
        return self.samples("validation")

    def samples(self, split: str, weights: list[float] | None = None) -> Mixture:
        """Of a split: rows, or documents where pairs are wanted."""
        key, seed = (split, self.pairs), self.seed if split == "train" else VALIDATION_SEED
        if key not in self.made:
            if self.pairs:
                self.made[key] = Pairs(self.stores[split], weights, seed=seed, span_length=self.span_length)
            elif self.span_length is not None:
                raise ValueError(f"data.span_length={self.span_length} is of pairs of spans: set data.pairs to true")
            else:
                self.made[key] = Mixture(self.stores[split], weights, seed=seed)
        return self.made[key]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can be fed, special ones among them."""
        splits = [self.train, self.validation]
        return max(int(split.typical_lengths().max()) for split in splits if len(split)) + SPECIAL_TOKENS

    def provide_for(self, objective: Any) -> None:
        """Give passes what an objective (or its class) asks for. ValueError if there is none of it, or ``pairs`` is
        false."""
        if unknown := set(objective.asks).difference(EXTRAS):
            raise ValueError(f"the objective asks for {', '.join(sorted(unknown))}; there are {', '.join(EXTRAS)}")
        contrasts, self.extras = objective.contrast is not None, objective.asks
        self.pairs = contrasts if self.pairs_wanted is None else self.pairs_wanted
        if contrasts and not self.pairs:
            raise ValueError("data.pairs=false: the objective contrasts pairs of spans")

    @property
    def steps_per_epoch(self) -> int:
        """As the trainer counts them: of all that an epoch has as many as it is limited to."""
        n = self.batches(self.train, self.batch_size, self.micro_batches_per_step).steps_per_epoch
        trainer: Any = self.trainer
        name = "overfit_batches" if trainer and trainer.overfit_batches > 0 else "limit_train_batches"
        return limited(n, trainer.limit_train_batches if trainer else None, name)

    def train_dataloader(self) -> StepLoader:
        if self.pairs and min(self.batch_size // 2, len(self.train)) < 2:
            raise ValueError(
                f"data.batch_size={self.batch_size}, {len(self.train)} documents: a step of pairs needs the spans of "
                "two documents or more"
            )
        return self.loader(self.train, self.batch_size, self.micro_batches_per_step, training=True)

    def val_dataloader(self) -> StepLoader | list:
        """The validation split, each sample once and masked as in epoch 0, the same on any number of devices."""
        validation = self.validation
        n = len(validation) * validation.each
        if not n:
            return []
        batch_size = min(self.batch_size, n)
        return self.loader(validation, batch_size, min(self.micro_batches_per_step, batch_size), training=False)

    def batches(self, mixture: Mixture, batch_size: int, micro_batches_per_step: int) -> BucketedBatches:
        return BucketedBatches(
            mixture,
            batch_size=batch_size,
            micro_batches_per_step=micro_batches_per_step,
            seed=mixture.seed,
            added=SPECIAL_TOKENS,
        )

    def loader(self, mixture: Mixture, batch_size: int, micro_batches_per_step: int, training: bool) -> StepLoader:
        batches = self.batches(mixture, batch_size, micro_batches_per_step)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        steps = Steps(
            mixture,
            batches,
            Vocabulary.of(self.tokenizer),
            self.masking if training else replace(self.masking, seed=VALIDATION_SEED),
            (rank, world_size),
            self.tokens_per_pass or self.affordable,
            few_shapes=self.few_shapes and training,
            few_sizes=self.few_sizes and training,
            extras=self.extras,
        )
        if not training:  # where weights are sharded, all devices must compute together
            steps.n_everywhere = min(steps.n_passes, -(-micro_batches_per_step // world_size))
            return StepLoader(steps, training, num_workers=0)
        trainer: Any = self.trainer
        if trainer and trainer.overfit_batches > 0:
            steps.n_repeated = self.steps_per_epoch
        begin = (lambda: trainer.global_step) if trainer else None
        return StepLoader(steps, training, self.num_workers, begin, self.steps_per_epoch)


def limited(n: int, limit: int | float | None, name: str = "limit_train_batches") -> int:
    """Of ``n`` steps as many as a ``limit`` of the trainer leaves: a number of them, or as a float a share."""
    steps = n if limit is None else int(n * limit) if isinstance(limit, float) else min(n, limit)
    if steps < 1:
        raise ValueError(f"trainer.{name}={limit} leaves no step of the {n:,} of an epoch")
    return steps


def check_shared(micro_batches: int, devices: int) -> None:
    """Raises ValueError for micro-batches of a step that so many devices cannot share out evenly."""
    if micro_batches % devices:
        raise ValueError(
            f"data.micro_batches_per_step={micro_batches} cannot be shared out evenly over {devices} devices; make it "
            f"a multiple of {devices}"
        )


def store_folder(name: str) -> Path:
    """A store's folder, or the store of that name in data/tokens."""
    folder, named = Path(os.path.expanduser(name)), Path("data/tokens") / name
    return named if named.is_dir() and not folder.exists() else folder
