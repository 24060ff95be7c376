"""PaliGemma: a SigLIP tower, a Gemma decoder, and three functions on them (prefill, extend, completion_logps).

Flax Linen, in its stateless subset, is used here and nowhere else: a GRPO step holds several parameter trees for one module
(policy, reference), so parameters, caches and keys are arguments, and nothing lives inside a module.
"""

from pg_ground.models.paligemma import PaliGemma

__all__ = ["PaliGemma"]
