"""Calls of tools in a model's text: how families of models write them, and how they are read while the text grows.

Knows nothing of tokens, engines or HTTP. Enter at `formats.FORMATS` and `reader.CallRules`.
"""
