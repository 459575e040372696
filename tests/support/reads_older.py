"""A script for another transformers, which writes what that version says.

That is the logits of model folders, and the ids of a text.

    python reads_older.py TEXT FOLDER [FOLDER ...]

It writes logits.pt into each, and prints one JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

IDS = [[1, 5, 9, 4, 2, 7, 3, 8]]


def logits(folder: Path) -> Any:
    """[1, T, V] float32 of a causal language model at `IDS`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), use_cache=False).logits


def main(text: str, folders: list[Path]) -> None:
    """Say what this version makes of them."""
    import torch
    import transformers

    said: dict[str, Any] = {"version": transformers.__version__, "ids": {}}
    for folder in folders:
        torch.save(logits(folder), folder / "logits.pt")
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            said["ids"][folder.name] = tokenizer(text)["input_ids"]
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
