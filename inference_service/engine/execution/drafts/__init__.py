"""A draft model: a smaller base with the same tokenizer proposes tokens, and the base's step verifies them."""
