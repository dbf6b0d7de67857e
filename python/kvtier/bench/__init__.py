"""Measurements on real models: ``kvbench model``, ``kvbench ruler``, ``kvbench needle``; ggml as a peer."""
