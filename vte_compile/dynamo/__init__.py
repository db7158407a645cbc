"""The torch.compile backend "vte": Dynamo's graphs, with the decoder in them replaced by its rewritten graphs.

``backend.py`` is the entry point; ``region.py`` finds the decoder in a graph and cuts it out, ``decoder_call.py`` runs
in its place, ``handles.py`` is what Dynamo sees of its cache, and ``explain.py`` says what applied and what did not.
"""
