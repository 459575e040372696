"""One file per stage, and what the stages share: targets, losses, alignment, engines, the student."""
