"""The facts of a model that head its report."""

from __future__ import annotations

from transformers import PreTrainedModel

from spdcompile.report.data import ModelReport


def describe_model(model: PreTrainedModel) -> ModelReport:
    """The model in one line."""
    config = model.config.get_text_config(decoder=True)

    def number(name: str) -> int | None:
        value = getattr(config, name, None)  # each family has its own choice of settings
        return value if isinstance(value, int) else None

    heads = number("num_attention_heads")
    return ModelReport(
        type=model.config.model_type,
        layers=number("num_hidden_layers"),
        hidden=number("hidden_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        vocab=number("vocab_size"),
        dtype=str(model.dtype).removeprefix("torch."),
    )
