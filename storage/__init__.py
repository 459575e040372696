"""The ground floor: what is on disk. numpy, pyarrow and duckdb; no torch, no transformers, no vllm."""
