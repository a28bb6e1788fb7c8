"""From statistics and weights to the tensors of a converted layer: what is decided, what is decomposed, what is written.

Nothing here runs a model or imports transformers.
"""
