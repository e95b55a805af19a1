"""The model as `transformers` knows models. `import cpdlm.hf` makes AutoModelForCausalLM load exported folders."""

from cpdlm.hf.model import CpdlmConfig, CpdlmForCausalLM
