"""From a file to tokens: rows, formats, splits, token limits. Imports no torch.

``read_rows`` -> rows -> a format's ``examples`` -> ``tokenize`` -> :class:`Corpus`.
"""
