"""What is said where memory runs out and nothing smaller can be tried."""

from ...storage.errors import StillroomError


def out_of_memory(tokens: int, message: str) -> StillroomError:
    """Of a training pass of so many tokens, which are one sample; `message` is torch's."""
    return StillroomError(
        f"train: out of memory in a forward pass of {tokens} tokens, one sample alone ({message}). "
        "Set train.gradient_checkpointing to true, cut the data shorter, or take a smaller student."
    )
