"""What shrinks a cell to a second: settings, a folder of code, a pretrained model."""

from pathlib import Path

# Shrinks any cell to a fraction of a second of training on a folder of a few documents.
TINY = {
    "size": "micro",
    "data.tokenizer": "bytes",
    "data.context": 64,
    "data.batch_rows": 2,
    "optim.steps": 2,
    "optim.warmup": 1,
    "train.precision": "32-true",
    "train.validate_every": 2,
    "train.validation_rows": 2,
    "evaluate.rows": 4,
    "decode.prompts": 2,
    "decode.prompt_tokens": 8,
    "decode.new_tokens": 8,
    "decode.repeats": 2,
    "decode.warmups": 1,
    "tracking.mlflow": False,
}
# The smallest model, and rows just long enough for it.
MICRO = {"size": "micro", "data.context": 64, "decode.prompt_tokens": 8, "decode.new_tokens": 8}
# What shrinks a cell of heads on a pretrained model, beside TINY.
TINY_RETROFIT = {
    "data.tokenizer": "model",
    "data.states": 64 * 8,
    "loss.draft_vocabulary": 100,
    "decode.draft_vocabulary": 100,
    "train.decode_prompts": 1,
    "loss.joint_fraction": 0.5,
    "decode.repeats": 1,
    "data.max_bytes": 0,
}


def code_folder(folder: Path) -> Path:
    """Sixty documents."""
    for number in range(60):
        lines = [f"def function_{number}_{line}(x):\n    return x * {number * 7 + line}\n" for line in range(12)]
        (folder / f"{number}.py").write_text("\n".join(lines))
    return folder


def small_pretrained(folder: Path, texts: list[Path]) -> Path:
    """A small random Llama with a tokenizer of its own, as a hub folder has them."""
    # Imported here: processes that need the settings only start at once.
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from cpdlm.data.tokenizer import BpeTokenizer

    bpe = BpeTokenizer.train("bpe:300", [path.read_bytes() for path in texts])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._model, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder
