"""The raw singular values that JW-SVD pools, from the inputs that the linears of a model really read."""

import pytest
import torch

import families
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.pipeline import compression
from spectrim.plan import factor_bytes
from test_calibrate import WORDS
from test_samples import word_tokenizer
