"""Encoders as bases, with adapters: BERT, RoBERTa, XLM-RoBERTa and ModernBERT."""
