"""Text -> tokens -> batches: sources, documents, splits, tokenizer, tokens, corpus, windows, batches."""
