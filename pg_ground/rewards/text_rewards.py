"""The text rewards by name: scores of a completion as text, on the host.

A text reward is a function `(completion, TextExample) -> float`, NaN if it does not apply to the
question. The worker processes import this module; it imports no JAX.
"""

from pg_ground.rewards.agent_rewards import agent, agent_format, agent_step
from pg_ground.rewards.location_rewards import (
    box_tokens_format,
    dict_coverage,
    dict_format,
    dict_iou,
    dict_point,
    json_boxes,
    json_boxes_squared,
    json_format,
    json_points,
    json_points_in_boxes,
    list_coverage,
    list_format,
    list_iou,
    list_iou_squared,
    list_point,
    ovd,
    ovd_ap,
    ovd_calibration,
    ovd_confidence,
    ovd_f,
    ovd_format,
    ovd_iou,
)
from pg_ground.rewards.spatial_rewards import spatial, spatial_answer
from pg_ground.rewards.text_example import TextExample, TextReward
from pg_ground.rewards.word_rewards import (
    count_exact,
    count_graded,
    exact_match,
    math_equal,
    think_answer_format,
    think_boxed_format,
    token_f1,
)

__all__ = ["TEXT_REWARDS", "TextExample", "TextReward"]

TEXT_REWARDS: dict[str, TextReward] = {
    "json_format": json_format,
    "json_points": json_points,
    "json_points_in_boxes": json_points_in_boxes,
    "json_boxes": json_boxes,
    "json_boxes_squared": json_boxes_squared,
    "dict_format": dict_format,
    "dict_point": dict_point,
    "dict_coverage": dict_coverage,
    "dict_iou": dict_iou,
    "list_format": list_format,
    "list_point": list_point,
    "list_coverage": list_coverage,
    "list_iou": list_iou,
    "list_iou_squared": list_iou_squared,
    "box_tokens_format": box_tokens_format,
    "ovd_format": ovd_format,
    "ovd_f": ovd_f,
    "ovd_iou": ovd_iou,
    "ovd_confidence": ovd_confidence,
    "ovd_calibration": ovd_calibration,
    "ovd_ap": ovd_ap,
    "ovd": ovd,
    "think_answer_format": think_answer_format,
    "think_boxed_format": think_boxed_format,
    "count_exact": count_exact,
    "count_graded": count_graded,
    "math": math_equal,
    "token_f1": token_f1,
    "exact_match": exact_match,
    "spatial_answer": spatial_answer,
    "spatial": spatial,
    "agent_format": agent_format,
    "agent_step": agent_step,
    "agent": agent,
}
