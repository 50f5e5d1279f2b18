"""Robust accuracy with intervals."""

from genray.evaluation.evaluator import Evaluator, chunks, join_flags
from genray.evaluation.results import accuracy, wilson_interval
from genray.evaluation.robust import attacked_flags, correct_flags, final_attacks, pgd_name

__all__ = [
    "accuracy",
    "Evaluator",
    "attacked_flags",
    "chunks",
    "correct_flags",
    "join_flags",
    "final_attacks",
    "pgd_name",
    "wilson_interval",
]
