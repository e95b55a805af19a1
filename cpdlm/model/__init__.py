"""Tokens -> hidden states -> the joint distribution of the next tokens."""
