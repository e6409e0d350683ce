"""An objective as a Hugging Face model, with its head.

    from condenser import CondenserForPreTraining

    model = CondenserForPreTraining.from_pretrained("my-export")
    model(input_ids=..., attention_mask=..., labels=...).loss        # labels: -100 where nothing is predicted
    model.save_pretrained("folder")                                  # or model.push_to_hub("owner/name")

`from_pretrained` takes what `save_pretrained` wrote, what `condenser export` wrote, a checkpoint of the authors' code
(give it ``skip_from``, which is not in the file), and any masked LM, which gets a fresh head. Folders or hub names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from condenser.models.backbones.base import REPORTED, build_masked_lm, check_complete, config_of, with_settings
from condenser.models.cocondenser import CoCondenser
from condenser.models.condenser import Condenser
from condenser.models.files import reading
from condenser.models.heads import HEAD_FILE, head_beside, load_head, parts
from condenser.models.initial import part_biases
from condenser.models.objective import (
    Objective,
    class_of,
    class_path,
    known_class,
    known_options,
    setting_names,
)
from condenser.models.padded import before_masking, flattened
from condenser.models.retromae import DupMAE, RetroMAE

OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # arguments of from_pretrained
OURS = (Condenser, CoCondenser, RetroMAE, DupMAE)
output: Any = torch.compiler.disable(lambda **values: ModelOutput(**values))  # whose attributes a compiler loses


class CondenserConfig(PretrainedConfig):
    """Configuration of a `CondenserForPreTraining`; the backbone's settings and the objective's are its attributes too.

    Args:
        backbone_config: of the masked LM; a BERT's by default.
        objective: class path of what is minimised.
        settings: the objective's (``skip_from``, ``n_head_layers``, ...).
        options: more of these, by name, and what Hugging Face keeps with every configuration.
    """

    model_type = "condenser"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        objective: str = class_path(Condenser),
        settings: dict[str, Any] | None = None,
        **options: Any,
    ):
        if isinstance(backbone_config, Mapping):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config or BertConfig()
        self.objective = objective
        self.settings = {**(settings or {}), **{name: options.pop(name) for name in self.names if name in options}}
        attention = self.backbone_config._attn_implementation  # which Hugging Face takes from it below
        super().__init__(**options | {"tie_word_embeddings": self.backbone_config.tie_word_embeddings})
        self.backbone_config._attn_implementation = attention

    @classmethod
    def of(cls, model: Objective) -> Self:
        return cls(model.lm.config, class_path(class_of(model)), model.settings)

    @property
    def names(self) -> list[str]:
        """Of the objective's settings; where its class is not known, a Condenser's."""
        return setting_names(known_class(self.objective) or Condenser)

    def __getattr__(self, name: str) -> Any:
        """What is not its own is the objective's, or the backbone's; but for what Hugging Face would check as this
        configuration's own, a ``temperature`` as one of text generation and ``rope_parameters``."""
        own = vars(self)
        if name in own.get("settings", {}) and name != "temperature":
            return own["settings"][name]
        if "backbone_config" in own and not name.startswith(("_", "rope")):
            return getattr(own["backbone_config"], name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        return self.backbone_config


class CondenserForPreTraining(PreTrainedModel):
    """A masked LM, and what is trained on it: ``model.lm`` is the encoder with its MLM head, ``model.c_head`` (or
    ``model.decoder``) the head that is dropped after pre-training. Functions read the weights of ``model.lm``, so hooks
    and adapters (NEFTune, LoRA) in its layers do nothing here.

    Args:
        config: of the masked LM and the objective.
        model: the objective, if it is there already.
    """

    config_class = CondenserConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: CondenserConfig, model: Objective | None = None):
        attention = model.lm.config._attn_implementation if model is not None else None
        super().__init__(config)
        if model is None:
            lm = AutoModelForMaskedLM.from_config(config.backbone_config, trust_remote_code=False)
            model = objective_on(lm, config.objective, config.settings)
        else:
            model.lm.config._attn_implementation = attention  # the configuration is shared, and has lost it
            there: list[Any] = [*model.modules(), *model.parameters()]
            for each in there:
                each._is_hf_initialized = True  # else post_init draws it anew
        self.model = model
        tied = model.lm.all_tied_weights_keys.items()
        self._tied_weights_keys = {f"model.lm.{weight}": f"model.lm.{source}" for weight, source in tied}
        self.post_init()

    @classmethod
    def of(cls, model: Objective) -> Self:
        return cls(CondenserConfig.of(model), model).train(model.training)

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """A model of this name: see the top of this file.

        Args:
            name: folder or hub name.
            options: ``dtype``, and Hugging Face's of the hub (revision, token); where they are to be other than the
                files say, ``objective``, a class, its path, or the name of one of ours, and settings of it. What
                `save_pretrained` wrote takes all of Hugging Face's where none of these is given.

        Raises:
            ValueError: nothing there, files that are damaged or would run code, or a head that does not fit.
        """
        hub = {key: options.pop(key) for key in OF_THE_HUB if key in options}
        config = options.pop("config", None) or config_of(str(name), hub)
        if isinstance(config, CondenserConfig) and not {"objective", *config.names} & options.keys():
            with_report = options.pop("output_loading_info", False)
            options |= {"config": config, "output_loading_info": True}
            with reading(name):
                loaded: Any = super().from_pretrained(str(name), *args, **hub, **options)
            check_complete(str(name), loaded[1])
            return loaded if with_report else loaded[0]
        dtype = as_dtype(options.pop("dtype", None))
        wanted = class_of_name(options.pop("objective", None))
        found = opened(str(name), {}, hub)
        if wanted is None and found.objective is not None and known_class(found.objective) is None:
            model = objective_on(found.lm, found.objective, found.settings)
        else:
            objective = wanted or known_class(found.objective or class_path(Condenser)) or Condenser
            own = {key: value for key, value in found.settings.items() if key in setting_names(objective)}
            model = made(objective, found.lm, own | options)
        fresh = load_head(model, found.head or {}, str(name))
        if fresh and found.objective and wanted is None and not options:
            raise ValueError(f"{Path(name) / HEAD_FILE} is damaged: it lacks {', '.join(fresh)}")
        if fresh:
            warn(f"{', '.join(fresh)} of {name} begins with random weights")
        if unused := parts(found.head or {}) - parts(model.head_state()):
            warn(f"{', '.join(sorted(unused))} of {name} is left out: a {type(model).__name__} like this has none")
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)  # and no buffers, as rotations are
        return cls.of(model.eval())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Losses of padded rows ``[B, L]``: ``loss``, which is minimised, and ``<term>_loss`` of each summand, means.

        ``labels`` are -100 where nothing is predicted. What an objective asks for beside them is made of the rows: the
        text before it was masked of ``labels``; for a contrast rows 2i and 2i + 1 are spans of one document.
        """
        batch = flattened(self.model.backbone, input_ids, attention_mask, labels, token_type_ids)
        batch |= before_masking(batch, drawn_anew=self.training)
        if self.model.contrast is not None and len(input_ids) % 2:
            raise ValueError(f"{len(input_ids)} rows: a contrast takes pairs, rows 2i and 2i + 1 of one document")
        if self.model.contrast is None:
            terms = self.model.losses(batch)
        else:
            cls, terms = self.model.cls_and_losses(batch)
            terms = terms | {"contrast": self.model.contrast(cls)}
        means = {f"{name}_loss": term.sum / max(batch[term.over], 1) for name, term in terms.items()}
        loss = torch.stack([term.weight * means[f"{name}_loss"] for name, term in terms.items()]).sum()
        return output(loss=loss, **means)

    def _init_weights(self, module: Any) -> None:
        self.model.lm._init_weights(module)

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        embeddings = self.model.lm.resize_token_embeddings(*args, **options)
        part_biases(self.model.lm)
        return embeddings

    def get_input_embeddings(self) -> Any:
        return self.model.lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.lm.get_output_embeddings()


AutoConfig.register(CondenserConfig.model_type, CondenserConfig)
AutoModelForPreTraining.register(CondenserConfig, CondenserForPreTraining)


def as_dtype(given: Any) -> torch.dtype:
    """Of Hugging Face's argument: "auto" is fp32, as this is what is trained.

    Raises:
        ValueError: no type of torch's for weights.
    """
    if given in (None, "auto"):
        return torch.float32
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={given!r} is no type of torch's for weights")
    return found


def class_of_name(given: Any) -> type[Objective] | None:
    """An objective by its class, its path, or the name of one of ours.

    Raises:
        ValueError: a name that is not known.
    """
    if given is None or isinstance(given, type):
        return given
    found = {each.__name__: each for each in OURS}.get(given) or known_class(given)
    if found is None:
        names = ", ".join(each.__name__ for each in OURS)
        raise ValueError(f"objective={given!r} is not known: {names}, or a class that is imported")
    return found


def warn(message: str) -> None:
    logging.get_logger(__name__).warning(message)


def objective_on(lm: PreTrainedModel, path: str, settings: dict[str, Any]) -> Objective:
    """The objective of this class path; where the class is not known, what a Condenser is of it."""
    known = known_class(path)
    if known is not None:
        return made(known, lm, settings)
    module = path.rpartition(".")[0]
    warn(
        f"the objective {path} is not imported (CONDENSER_IMPORT={module}): its model is read as what a Condenser is "
        "of it, with another loss"
    )
    own = {name: value for name, value in settings.items() if name in setting_names(Condenser)}
    return made(Condenser, lm, {"n_head_layers": 0} | own)


def made(objective: type[Objective], lm: PreTrainedModel, settings: dict[str, Any]) -> Objective:
    try:
        return objective.from_masked_lm(lm, **known_options(objective, {}, settings))
    except (TypeError, AttributeError) as error:
        what = f"{objective.__name__} with {settings} on a {type(lm).__name__}"
        raise ValueError(f"{what} cannot be made: {error}") from error


class Found(NamedTuple):
    """A model as it was found."""

    lm: PreTrainedModel
    head: dict[str, Tensor] | None = None  # what there is of weights beside the masked LM's
    objective: str | None = None  # its class path, where the files say it
    settings: dict[str, Any] = {}  # noqa: RUF012, never changed


def opened(name: str, settings: dict[str, Any], hub: Mapping[str, Any] = {}) -> Found:
    """The masked LM of a folder or hub name, with ``settings`` of its configuration changed, and its head.

    Raises:
        ValueError: see `build_masked_lm`; a damaged head, or one that would run code.
    """
    config = config_of(name, hub)
    if isinstance(config, CondenserConfig):
        config.backbone_config = with_settings(config.backbone_config, settings, name)
        with reading(name):
            whole, report = PreTrainedModel.from_pretrained.__func__(  # type: ignore[attr-defined]
                CondenserForPreTraining, name, config=config, **REPORTED, **hub
            )
        check_complete(name, report)
        return Found(whole.model.lm, whole.model.head_state(), config.objective, config.settings)
    return Found(build_masked_lm(name, settings, hub), *head_beside(name, hub))
