"""What a config of a mixture of experts asks of its training, and this training does not do."""

from typing import Any


def left_out(config: Any) -> list[str]:
    """What a student's config asks of its training, and this training does not do."""
    of_experts = getattr(config, "ffn_config", None)  # DBRX keeps it there
    weights = [
        getattr(config, "router_aux_loss_coef", None),
        getattr(config, "aux_loss_coef", None),
        getattr(of_experts, "moe_loss_weight", None),
    ]
    if not getattr(config, "output_router_logits", False) or not any(weights):
        return []
    # It is a product of means over all tokens of a pass, so it would depend on which samples share
    # one, and on how many passes a step takes; the loss here is a sum over tokens.
    return [
        "the balancing loss of experts that the student's config asks for (output_router_logits) "
        "is left out: it would depend on which samples share a pass"
    ]
