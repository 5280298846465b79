"""What a model reads: text becomes documents of token ids, documents become batches.

Read tokenizer, held_out, problems, documents, corpus and batches, in this order; shards is for text
that does not fit into memory.
"""
