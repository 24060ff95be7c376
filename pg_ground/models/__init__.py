"""PaliGemma: a SigLIP tower, a Gemma decoder, and the functions prefill, extend and
completion_logps.

Only this package uses Flax Linen, and only its stateless subset. A GRPO step has several parameter
trees for one module (policy and reference). So parameters, caches and keys are arguments, and a
module has no state.
"""

from pg_ground.models.paligemma import PaliGemma

__all__ = ["PaliGemma"]
