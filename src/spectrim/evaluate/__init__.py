"""Evaluation: perplexity, visual question answering, and what a model costs, for any number of model directories."""

from spectrim.demo.tasks import Question
from spectrim.evaluate.answering import Answer, normalise, vqa
from spectrim.evaluate.intervals import PairedDifference, mcnemar, paired_difference, wilson
from spectrim.evaluate.language import Perplexity, perplexity, plan_windows
from spectrim.evaluate.questions import blind_questions, load_questions
from spectrim.evaluate.results import DirectoryResult, EvaluationReport, TaskScore, VqaScore
from spectrim.evaluate.running import evaluate
from spectrim.evaluate.tables import costs, losses, markdown, table

__all__ = [
    "Answer",
    "DirectoryResult",
    "EvaluationReport",
    "PairedDifference",
    "Perplexity",
    "Question",
    "TaskScore",
    "VqaScore",
    "blind_questions",
    "costs",
    "evaluate",
    "load_questions",
    "losses",
    "markdown",
    "mcnemar",
    "normalise",
    "paired_difference",
    "perplexity",
    "plan_windows",
    "table",
    "vqa",
    "wilson",
]
