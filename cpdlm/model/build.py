"""The model of a config, and how many parameters each part of it has."""

from torch import nn

from cpdlm.config import Config
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk, build_body


def build_language_model(config: Config, vocab_size: int, trunk: LanguageModel | None = None) -> LanguageModel:
    """The model of a config. trunk: the frozen model that model.trunk names, whose trunk and vocabulary are shared.

    Its context is a training row's; on a pretrained trunk, all that the trunk allows.
    """
    assert (trunk is not None) == (config.frozen != "self"), (
        "a frozen trunk is given exactly when model.trunk names one"
    )
    model = LanguageModel(
        trunk.trunk if trunk is not None else Trunk(build_body(config, vocab_size)),
        trunk.vocab_size if trunk is not None else vocab_size,
        HeadsConfig.of(config),
        context=trunk.context if trunk is not None and config.is_pretrained else config.data.context,
        frozen_target=trunk is not None,
        tie_embeddings=trunk.embeddings_are_tied if trunk is not None else config.model.tie_embeddings,
        output=trunk.output if trunk is not None else None,
        chunk_bytes=config.loss.chunk_mib * 2**20,
    )
    model.active = config.decode.active
    if trunk is not None:
        model.unembedding.bias = trunk.unembedding.bias
        if not trunk.embeddings_are_tied:
            model.unembedding.weight = trunk.unembedding.weight.requires_grad_(False)
    return model


def parameter_counts(model: LanguageModel) -> dict[str, int]:
    """Parameters by part; tied embeddings count once, with the trunk."""

    def count(module: nn.Module | None) -> int:
        return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0

    gate = count(model.heads.gate) if model.heads is not None else 0
    return {
        "trunk": count(model.trunk),
        "unembedding": count(model.unembedding) - (model.trunk.embedding.numel() if model.embeddings_are_tied else 0),
        "heads": count(model.heads) - gate,
        "gate": gate,
        "anchor": count(model.anchor),
        "total": count(model),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
