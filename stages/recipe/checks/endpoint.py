"""What an endpoint that writes must be told, and what has no meaning for one or without one."""

import re
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..engines import PRICES, Generate
from ..sections import Recipe
from .engines import unfit_to_keep

_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_OF_AN_ENDPOINT = (
    "base_url api_key_env concurrency timeout_seconds usd_per_million_prompt_tokens "
    "usd_per_million_completion_tokens max_usd max_tokens_total accept_partial license".split()
)

_WITHOUT_EFFECT = frozenset(
    "metadata priority prompt_cache_key request_id safety_identifier service_tier store "
    "user".split()
)
"""Fields of a body that move no log-probability."""

Errors = list[tuple[str, str]]


def check_endpoint(generate: Generate) -> Errors:
    """What is wrong with the fields of an endpoint: (dotted path, message)."""
    if not generate.remote:
        message = "belongs to generate.engine 'openai'. Remove it, or name that engine"
        return [
            (f"generate.{name}", message)
            for name in _OF_AN_ENDPOINT
            if getattr(generate, name) != Generate.model_fields[name].default
        ]
    return _whom(generate) + _key(generate) + _budget(generate)


def _whom(generate: Generate) -> Errors:
    errors = []
    if not (generate.model or "").strip():
        message = "missing: an endpoint serves models by name. Write the one that is to answer"
        errors.append(("generate.model", message))
    if generate.base_url is None:
        message = "missing: which endpoint? Write its address, as https://api.example.com/v1"
        return [*errors, ("generate.base_url", message)]
    try:
        url = urlsplit(generate.base_url)
        whole = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        whole = False
    if not whole:
        message = "must begin with https:// (or http://) and a host, as https://api.example.com/v1"
        return [*errors, ("generate.base_url", message)]
    if url.username or url.password or url.query or url.fragment:
        message = (
            "holds a user, a query or a fragment, where keys stand, and recipes are recorded. Name "
            "the key's environment variable in generate.api_key_env"
        )
        errors.append(("generate.base_url", message))
    return errors


def _key(generate: Generate) -> Errors:
    """No message repeats what stands there: it may be the key itself."""
    name = generate.api_key_env
    if name is None:
        return []
    if not _NAME.fullmatch(name):
        message = (
            "is not the name of an environment variable, in capitals. Write the name, as "
            "MY_API_KEY, and put the key into that variable: recipes are recorded, keys are not"
        )
        return [("generate.api_key_env", message)]
    url = urlsplit(generate.base_url or "")
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        message = (
            "sends the key over the network as plain text. Use https://, or leave "
            "generate.api_key_env out where the endpoint asks for no key"
        )
        return [("generate.base_url", message)]
    return []


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _budget(generate: Generate) -> Errors:
    errors = []
    given = [name for name in PRICES if getattr(generate, name) is not None]
    if generate.max_usd is not None and len(given) < len(PRICES):
        missing = next(name for name in PRICES if name not in given)
        message = "missing: without both prices nobody can tell what is reached at generate.max_usd"
        errors.append((f"generate.{missing}", message))
    elif len(given) == 1:
        missing = next(name for name in PRICES if name not in given)
        errors.append((f"generate.{missing}", "missing: the other price is there. Write both"))
    limited = generate.max_usd is not None or generate.max_tokens_total is not None
    if generate.accept_partial and not limited:
        message = "has no meaning without generate.max_usd or generate.max_tokens_total. Remove it"
        errors.append(("generate.accept_partial", message))
    return errors + _in_vain(generate)


def _in_vain(generate: Generate) -> Errors:
    """Limits that nothing reaches, or that no call is within.

    A recipe that goes on with a part may ask for nothing more, and take what is there.
    """
    errors, each = [], generate.max_tokens
    prompt, completion = (getattr(generate, name) for name in PRICES)
    if generate.max_usd is not None and prompt == completion == 0:
        message = (
            "both prices are 0, so nothing ever reaches it. Write the prices, or limit "
            "generate.max_tokens_total in its place"
        )
        errors.append(("generate.max_usd", message))
    if generate.accept_partial:
        return errors
    called = f"a call may write generate.max_tokens, {each}, and is made where the limit is enough"
    most = generate.max_tokens_total
    if most is not None and most <= each:
        message = f"{most} tokens are not enough for one call: {called}. Raise it, or lower that"
        errors.append(("generate.max_tokens_total", message))
    if generate.max_usd is not None and completion is not None:
        if (cost := each * completion / 1e6) > generate.max_usd:
            message = f"is not enough for one call, about {cost:.4g}: {called}. Raise it, or lower"
            errors.append(("generate.max_usd", f"{message} that"))
    return errors


def check_teaching(recipe: Recipe) -> Errors:
    """What is wrong with `generate.keep` of an endpoint.

    Its log-probabilities become soft targets. What it gives under other settings nobody here can
    tell: of the whole vocabulary, or after them.
    """
    generate, score, errors = recipe.generate, recipe.score, []
    if generate is None or generate.keep is None or not generate.teaches:
        return []
    if (generate.temperature, generate.top_p) != (1.0, 1.0):
        name = "temperature" if generate.temperature != 1.0 else "top_p"
        message = (
            f"is {getattr(generate, name):g}, and whether the log-probabilities of an endpoint are "
            "those before or after it nobody can tell; generate.keep wants those at 1. Set it to "
            "1, or remove generate.keep"
        )
        errors.append((f"generate.{name}", message))
    if generate.stop:
        message = (
            "with generate.keep: which log-probabilities of an endpoint belong to the stop string "
            "nobody can tell. Remove one of the two"
        )
        errors.append(("generate.stop", message))
    errors += [("generate.engine_args", why) for why in _moving(recipe, generate)]
    if recipe.data.turns == "all":
        message = (
            "keeps no distributions of a prompt's own turns, which data.turns: all scores. Remove "
            "one"
        )
        errors.append(("generate.keep", message))
    if recipe.several:
        message = (
            "an endpoint with generate.keep is the teacher of its rows, and the only one. Name "
            "`teacher`, which lends the tokenizer, or remove generate.keep"
        )
        errors.append(("teachers", message))
    if recipe.student is not None and recipe.student.from_teacher_layers is not None:
        message = (
            "the teacher is behind an endpoint (generate.keep), and its layers are not here. "
            "Remove it"
        )
        errors.append(("student.from_teacher_layers", message))
    if score is None:
        message = (
            "there is no section `score` that would find them. Remove it, or add score: {k: ...}"
        )
        return [*errors, ("generate.keep", message)]
    if score.engine != "auto":
        message = (
            f"{score.engine!r} reads texts, and the teacher is behind an endpoint (generate.keep), "
            "which says what it drew from while it writes, and never again. Remove it"
        )
        errors.append(("score.engine", message))
    if unfit := unfit_to_keep(score, generate.keep.k):
        message = f"{unfit}, and an endpoint reads no text again. Set that, or remove generate.keep"
        errors.append(("generate.keep", message))
    return errors


def _moving(recipe: Recipe, generate: Generate) -> Iterator[str]:
    """Arguments by which an answer is of another distribution or prompt than is written down."""
    given = generate.engine_args.get("chat_template_kwargs", {})
    if given != recipe.data.chat_template_kwargs:
        yield (
            f"chat_template_kwargs is {given!r}, and data.chat_template_kwargs is "
            f"{recipe.data.chat_template_kwargs!r}: with generate.keep the endpoint must read the "
            "prompt as it is written down here. Give the same to both"
        )
    for name in sorted(generate.engine_args.keys() - _WITHOUT_EFFECT - {"chat_template_kwargs"}):
        yield (
            f"{name!r} may change what the log-probabilities are of, and generate.keep wants those "
            "of the model itself. Remove one of the two"
        )
