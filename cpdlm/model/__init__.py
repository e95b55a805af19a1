"""Tokens -> hidden states -> the joint law of the next tokens."""
