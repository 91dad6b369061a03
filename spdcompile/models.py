"""Turns what the caller names as a model - a model, a local directory, a config - into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from spdcompile.errors import CheckpointError, UsageError

ModelSource = PreTrainedModel | PreTrainedConfig | str | Path

_CAUSAL_LM_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel")  # classes that have since been renamed
_NEEDED = "a causal language model (AutoModelForCausalLM), one that predicts the next token"
_LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}


def resolve_model(
    model: ModelSource, *, weights: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Makes a causal LM in eval mode of what the caller names; nothing is downloaded or executed.

    Args:
        model: a causal LM, a local directory in Hugging Face's format, or a configuration.
        weights: whether the parameters must hold data. Without them a directory needs only its
            config.json, and the model is built on the meta device.
        dtype: dtype of the parameters; default that of the config, or of the checkpoint.

    Returns: the model that was given, or a new one.

    Raises:
        UsageError: it is no causal LM, no readable directory, or has no weights where they are
            needed.
    """
    if isinstance(model, PreTrainedModel):
        return _check_model(model, weights, dtype).eval()
    if isinstance(model, PreTrainedConfig):
        if weights:
            raise UsageError(
                "A configuration alone cannot be run.",
                where=f"model={type(model).__name__}",
                found="a configuration, which has no weights",
                needed="a model, or a directory with *.safetensors",
            )
        _check_config(model, type(model).__name__)
        return _build(model, dtype, type(model).__name__)
    if not isinstance(model, str | Path):
        raise UsageError(
            "The model is of a type that cannot be read.",
            where="model",
            found=type(model).__name__,
            needed="a PreTrainedModel, a PreTrainedConfig or the path of a local directory",
        )
    return _from_directory(Path(model), weights, dtype)


def _check_model(
    model: PreTrainedModel, weights: bool, dtype: torch.dtype | None
) -> PreTrainedModel:
    name = type(model).__name__
    if not any(cls.__name__ in _CAUSAL_LM_CLASSES for cls in type(model).__mro__):
        raise _not_causal("model", name)
    if _is_encoder(model.config):
        raise _not_causal("model", f"{name} with is_decoder=False, which attends to both sides")
    if dtype not in (None, model.dtype):
        raise UsageError(
            "The dtype is not that of the model.",
            where="dtype",
            found=f"dtype={dtype} for a model in {model.dtype}",
            needed="no dtype: a model is used as it is",
            fix=f"convert it first: model.to({dtype})",
        )
    if weights:
        check_not_quantized(model, "model")
    if weights and any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(
            "The model has no weights.",
            where="model",
            found=f"{name} with parameters on the meta device",
            needed="parameters that hold data",
        )
    return model


def check_not_quantized(model: PreTrainedModel, where: str) -> None:
    """Refuses weights that are codes and scales: a shard of them is not the shard of the weight.

    Raises:
        UsageError: names how they are quantized.
    """
    settings = getattr(model.config, "quantization_config", None)
    found = ""
    if settings is not None:
        named = settings if isinstance(settings, dict) else vars(settings)
        found = f"a model quantized by {named.get('quant_method', 'an unknown method')}"
    for name, tensor in model.named_parameters():
        if type(tensor.data) is not torch.Tensor:
            found = found or f"{name}, a {type(tensor.data).__name__}"
    if found:
        raise UsageError(
            "Quantized weights are not supported.",
            where=where,
            found=found,
            needed="weights in float32, bfloat16 or float16",
            fix="dequantize the model (model.dequantize()), and save it",
        )


def _from_directory(directory: Path, weights: bool, dtype: torch.dtype | None) -> PreTrainedModel:
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is not a directory.",
            where=f"model={str(directory)!r}",
            found="a file" if directory.exists() else "nothing at that path",
            needed="a local directory; only local directories are read, nothing is downloaded",
            fix="download the model first, for example with `hf download`",
        )
    config = _read_config(directory)
    _check_config(config, f"{directory}/config.json")
    if not weights:
        return _build(config, dtype, f"{directory}/config.json")
    check_weights(directory)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        output_loading_info=True,
        **_LOCAL_ONLY,
    )
    for kind in ("missing", "unexpected"):
        if names := sorted(info[f"{kind}_keys"]):
            raise CheckpointError(
                f"{names[0]} is {kind} in the checkpoint.",
                where=str(directory),
                found=f"{len(names)} {kind} tensors: {', '.join(names[:3])}",
                needed="the tensors of the model, no more and no fewer",
                fix="see that config.json belongs to these weights",
            )
    return loaded.eval()


def _read_config(directory: Path) -> PreTrainedConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{directory} has no config.json.",
            where=f"model={str(directory)!r}",
            found=", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing",
            needed="a config.json as save_pretrained writes it",
        )
    try:
        return AutoConfig.from_pretrained(directory, **_LOCAL_ONLY)
    except Exception as error:  # transformers raises many types for a file that it cannot use
        raise _unusable(error, str(path)) from error


def _build(config: PreTrainedConfig, dtype: torch.dtype | None, where: str) -> PreTrainedModel:
    """The model on the meta device."""
    given = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)
    except Exception as error:  # whatever a model's constructor raises on values it cannot use
        raise _unusable(error, where) from error
    return model.eval()


def _check_config(config: PreTrainedConfig, where: str) -> None:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _not_causal(where, _kind(config))
    named = config.architectures or []
    if named and not any(_is_causal_lm(name) for name in named):
        raise _not_causal(where, _kind(config))
    if _is_encoder(config):
        raise _not_causal(where, f"{_kind(config)} with is_decoder=false")


def _is_causal_lm(architecture: str) -> bool:
    return architecture in _CAUSAL_LM_CLASSES or architecture.endswith(_CAUSAL_LM_SUFFIXES)


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model type that can be both, such as BERT, is configured to see both sides."""
    both = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return both and getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder


def _kind(config: PreTrainedConfig) -> str:
    named = f" ({', '.join(config.architectures)})" if config.architectures else ""
    return f"model type {config.model_type!r}{named}"


def _not_causal(where: str, found: str) -> UsageError:
    return UsageError(
        "This is not a causal language model.", where=where, found=found, needed=_NEEDED
    )


def _unusable(error: Exception, where: str) -> UsageError:
    lines = str(error).strip().splitlines() or [""]
    return UsageError(
        "transformers cannot make a model of this configuration.",
        where=where,
        found=f"{type(error).__name__}: {lines[0]}",
        needed="a model type that transformers itself has; code from a checkpoint is never run",
    )


def check_weights(directory: Path) -> None:
    """Raises UsageError if a directory has no weights that can be read."""
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in directory.glob(pattern))
    raise UsageError(
        f"{directory} has no weights that can be read.",
        where=f"model={str(directory)!r}",
        found=f"{', '.join(pickles)}, pickle files, which are never read"
        if pickles
        else "no *.safetensors",
        needed="weights in *.safetensors",
        fix="convert them with save_pretrained" if pickles else None,
    )
