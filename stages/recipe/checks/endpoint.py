"""What an endpoint that writes must be told, and what has no meaning for one or without one."""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..engines import PRICES, Generate

_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_OF_AN_ENDPOINT = (
    "base_url api_key_env concurrency timeout_seconds usd_per_million_prompt_tokens "
    "usd_per_million_completion_tokens max_usd max_tokens_total accept_partial license".split()
)

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
            "holds a user, a query or a fragment, where keys stand, and recipes are recorded. Name the "
            "key's environment variable in generate.api_key_env"
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
            "is not the name of an environment variable, in capitals. Write the name, as MY_API_KEY, and put the "
            "key into that variable: recipes are recorded, keys are not"
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
    return errors
