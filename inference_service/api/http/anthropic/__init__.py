"""Anthropic's Messages API: the same chats, in its words.

Source: the types of PyPI's `anthropic`, which the tests are made with.
"""
