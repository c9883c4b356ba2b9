"""Encoders as bases, with adapters: BERT, RoBERTa and XLM-RoBERTa."""
