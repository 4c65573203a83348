"""Evaluation: perplexity, visual question answering, and what a model costs, for any number of model directories."""

from spectrim.demo.tasks import Question
from spectrim.evaluate.answering import Answer, normalise, vqa
from spectrim.evaluate.divergence import Divergence
from spectrim.evaluate.intervals import PairedDifference, mcnemar, paired_difference, wilson
from spectrim.evaluate.language import Perplexity, perplexity, plan_windows
from spectrim.evaluate.questions import blind_questions, load_questions
from spectrim.evaluate.results import DirectoryResult, EvaluationReport, TaskScore, VqaScore
from spectrim.evaluate.running import evaluate
from spectrim.evaluate.tables import costs, divergences, losses, markdown, remarks, table

ImageQuestion = Question  # the public name of a question about an image

__all__ = [
    "Answer",
    "DirectoryResult",
    "Divergence",
    "EvaluationReport",
    "ImageQuestion",
    "PairedDifference",
    "Perplexity",
    "Question",
    "TaskScore",
    "VqaScore",
    "blind_questions",
    "costs",
    "divergences",
    "evaluate",
    "load_questions",
    "losses",
    "markdown",
    "mcnemar",
    "normalise",
    "paired_difference",
    "perplexity",
    "plan_windows",
    "remarks",
    "table",
    "vqa",
    "wilson",
]
