"""What a model reads: text becomes documents of token ids, documents become batches. Read
tokenizer, held_out, problems, documents, corpus, batches; shards is for what memory cannot hold."""
