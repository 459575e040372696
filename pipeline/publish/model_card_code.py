"""Code in a student's card: how its folder, or its adapter's, is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from ...stages.recipe.engines import lora_room
from ...stages.recipe.formats import FORMATS
from ...stages.recipe.run_folder import LATEST, RUN, STUDENT, named_run
from ...stages.recipe.tasks import TASKS


def student_code(recipe: Mapping[str, Any]) -> dict[str, str]:
    """How to load the folder, in transformers and vLLM."""
    task = TASKS[recipe["run"]["task"]]
    if recipe["student"].get("factory"):
        return {"code": _FACTORY, "vllm": ""}
    if task.structure.images:
        return {
            "code": "from transformers import pipeline\n\n"
            f'classify = pipeline("{task.hub_name}", model="path/to/student")\n'
            'print(classify("image.png"))',
            "vllm": "",
        }
    if task.labelled:
        # What is said of a word is said at its first token.
        how = "" if task.structure.whole_text else ', aggregation_strategy="first"'
        text = (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("{task.hub_name}", model="path/to/student"{how})\n'
        )
        vllm = 'from vllm import LLM\n\nllm = LLM("path/to/student", runner="pooling")\n'
        return {
            "code": text + 'print(classify("A text to classify"))',
            "vllm": vllm + 'print(llm.classify("A text to classify")[0].outputs.probs)'
            if task.structure.whole_text
            else "",
        }
    if task.structure.masked:
        return {
            "code": "from transformers import pipeline\n\n"
            f'fill = pipeline("{task.hub_name}", model="path/to/student")\n'
            'print(fill(f"Once upon a {fill.tokenizer.mask_token}."))',
            "vllm": "",
        }
    method, asked = _question(recipe)
    return {
        "code": "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model="path/to/student")\n'
        f'print(generate({asked}, max_new_tokens=40)[0]["generated_text"])',
        "vllm": 'from vllm import LLM\n\nllm = LLM("path/to/student")\n'
        f"print(llm.{method}({asked})[0].outputs[0].text)",
    }


_FACTORY = """import json
from safetensors.torch import load_file

made = json.load(open("path/to/student/factory.json"))
# made["factory"] names the file and the function; made["files"] has the sha256 of it and of\
 the files
# beside it that it needs. They are not published here.
from FILE import FUNCTION

model = FUNCTION(**made["arguments"])
model.load_state_dict(load_file("path/to/student/model.safetensors"))"""


def _question(recipe: Mapping[str, Any]) -> tuple[str, str]:
    """The method of vLLM that asks as the student was taught, and what is asked."""
    if FORMATS[recipe["data"]["format"]].conversation:
        return "chat", '[{"role": "user", "content": "Hello!"}]'
    return "generate", '"Once upon a time"'


def adapter_code(shown: Mapping[str, Any]) -> dict[str, str]:
    """How to load the adapter onto its initial model, in PEFT and, where it writes text, vLLM."""
    base, task = _to_load(shown["student"]["model"]), TASKS[shown["run"]["task"]]
    labelled, auto = task.labelled, f"AutoModel{task.models.suffix}"
    method, asked = _question(shown)
    room = lora_room({"r": shown["student"]["lora"]["rank"]})
    return {
        "code": f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained({json.dumps(base)})\n"
        'model = PeftModel.from_pretrained(model, "path/to/adapter")',
        "vllm": ""
        if labelled
        else "from vllm import LLM\nfrom vllm.lora.request import LoRARequest\n\n"
        f"llm = LLM({json.dumps(base)}, enable_lora=True, max_lora_rank={room})\n"
        'adapter = LoRARequest("student", 1, "path/to/adapter")\n'
        f"print(llm.{method}({asked}, lora_request=adapter)[0].outputs[0].text)",
    }


def _to_load(model: str) -> str:
    """The folder of a run's student as transformers is told it; other names as they are."""
    return f"{model.removeprefix(RUN)}/{LATEST}/{STUDENT}" if named_run(model) else model
