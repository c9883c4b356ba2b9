"""Between text and tokens: the tokenizer, chat templates, and processes in which untrusted ones run."""
