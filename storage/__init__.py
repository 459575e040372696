"""The ground floor: what is on disk. It needs numpy, pyarrow and duckdb.

It never imports torch, transformers or vllm.
"""
