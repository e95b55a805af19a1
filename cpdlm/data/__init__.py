"""Text -> cached tokens -> rows and batches: sources, tokenizer, corpus, windows, datamodule, in that order."""
