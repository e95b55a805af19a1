"""The model as `transformers` knows models."""
