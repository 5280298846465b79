"""What a model reads: tokens, documents, problems, batches."""
